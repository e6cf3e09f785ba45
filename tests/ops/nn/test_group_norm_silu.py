"""group_norm_silu: values against float64, its second source and shift, special values, threads, arguments."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from cuda_on_host import in_use, machine
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.calls import GroupNormCall

LAST = torch.channels_last
# (N, C, H, W), groups by regime. C++: less than a lane; 5 channels: a part of a vector alone; 32 = two vectors of
# AVX-512; 2 channels a group; 104 = blocks of 4, 2 and 1 vectors and a part; 256; one group; one channel a group; a
# sample of several chunks of pixels with a tail. GPUs: 3 channels a group, of which more than a program or a block
# takes, with a shorter last block; a wide group of more vectors than threads; one of 33 vectors; several tiles with a
# tail of pixels, a sample that does not fit shared memory, and wide groups that vectors would tie together.
CASES = [
    ((2, 1, 1, 1), 1),
    ((3, 5, 3, 5), 5),
    ((4, 32, 8, 8), 8),
    ((3, 64, 7, 7), 32),
    ((2, 104, 5, 3), 13),
    ((2, 256, 4, 4), 32),
    ((2, 48, 6, 6), 1),
    ((2, 24, 3, 3), 24),
    ((1, 40, 33, 31), 4),
    ((1, 72, 4, 4), 24),
    ((2, 96, 4, 5), 32),
    ((1, 2112, 2, 2), 1),
    ((1, 264, 1, 3), 1),
    ((1, 32, 40, 41), 4),
    ((1, 4104, 2, 4), 8),
]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    n, c = shape[:2]
    x = (torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype).contiguous(memory_format=LAST)
    weight, bias = (torch.randn(c, generator=generator).to(dtype) for _ in range(2))
    return x, weight, bias, torch.randn(n, c, generator=generator).to(dtype)


def exact(x, groups, weight, bias, shift=None, skip=None, eps=1e-5, activation="silu"):
    u = (x if skip is None else torch.cat([x, skip], 1)).double()
    if shift is not None:
        u = u + shift.double()[:, :, None, None]
    y = u.reshape(len(u), groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + eps).sqrt()
    y = y.view(u.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y * y.sigmoid() if activation else y


def close(got, want, dtype, backend=None):
    # float32: a dozen roundings of values up to 20. Halves: half a unit in the last place and the same; a whole one
    # where Triton's interpreter cuts bfloat16 off. A group of one element is its bias, to the rounding of element and
    # shift over sqrt(eps).
    interpreted = backend is not None and backend.id == "triton-interpreter"
    relative = {torch.float32: 4e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}[dtype]
    absolute = 5e-5 if want[0].numel() == 1 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=2.5 * relative if interpreted else relative, atol=absolute)


@pytest.mark.sanitize
@on_backends("group_norm_silu")
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_against_float64(backend, shape, groups, dtype):
    x, weight, bias, shift = (each.to(backend.device) for each in draw(shape, dtype=dtype))
    wide = torch.cat([shift, shift], 1)[:, : shape[1]]  # rows apart
    before = x.clone()
    for more in ({}, {"activation": None}, {"shift": wide}):
        got = kr_fast.group_norm_silu(x, groups, weight, bias, **more)
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=LAST)
        close(got, exact(x, groups, weight, bias, **more), dtype, backend)
    assert torch.equal(x, before)


@pytest.mark.sanitize
@on_backends("group_norm_silu")
@pytest.mark.parametrize("channels", [(32, 32, 8), (64, 32, 32), (17, 7, 6), (3, 61, 16), (8, 60, 4)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_second_source(backend, channels, dtype):
    """64 + 32 in 32 groups and the odd ones: a group lies across both sources."""
    first, second, groups = channels
    x, skip = (draw((3, c, 5, 6), 9 * c, dtype)[0].to(backend.device) for c in (first, second))
    weight, bias, shift = (each.to(backend.device) for each in draw((3, first + second, 5, 6), dtype=dtype)[1:])
    for more in ({}, {"shift": shift}):
        got = kr_fast.group_norm_silu(x, groups, weight, bias, skip=skip, **more)
        close(got, exact(x, groups, weight, bias, skip=skip, **more), dtype, backend)
    # A group inside one source sees the same numbers in the same order as in the concatenation.
    joined = torch.cat([x, skip], 1).contiguous(memory_format=LAST)
    close(kr_fast.group_norm_silu(joined, groups, weight, bias, shift=shift), got.double(), dtype, backend)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_half_precision_takes_float32_parameters(isa, dtype):
    x, _, _, _ = draw((2, 40, 5, 5), dtype=dtype)
    _, weight, bias, shift = draw((2, 40, 5, 5))
    close(kr_fast.group_norm_silu(x, 4, weight, bias, shift=shift), exact(x, 4, weight, bias, shift), dtype)


def test_without_weight_or_bias(isa):
    x, weight, bias, _ = draw((2, 24, 5, 5))
    one, zero = torch.ones(24), torch.zeros(24)
    close(kr_fast.group_norm_silu(x, 4, None, None), exact(x, 4, one, zero), torch.float32)
    close(kr_fast.group_norm_silu(x, 4, weight, None), exact(x, 4, weight, zero), torch.float32)
    close(kr_fast.group_norm_silu(x, 4, None, bias), exact(x, 4, one, bias), torch.float32)


def test_shift_rows_may_be_strided_or_shared(isa):
    x, weight, bias, shift = draw((3, 24, 5, 5))
    want = kr_fast.group_norm_silu(x, 4, weight, bias, shift=shift)
    wide = torch.zeros(3, 60)
    wide[:, 10:34] = shift
    assert torch.equal(kr_fast.group_norm_silu(x, 4, weight, bias, shift=wide[:, 10:34]), want)
    assert torch.equal(kr_fast.group_norm_silu(x, 4, weight, bias, shift=shift.t().contiguous().t()), want)
    shared = shift[:1].expand(3, -1)
    close(kr_fast.group_norm_silu(x, 4, weight, bias, shift=shared), exact(x, 4, weight, bias, shared), torch.float32)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_variance_survives_a_large_mean(isa, offset):
    """E[x^2] - E[x]^2 in float32 would lose all digits of the variance here."""
    x, weight, bias, _ = draw((2, 32, 16, 16))
    x = x + offset
    error = (kr_fast.group_norm_silu(x, 8, weight, bias).double() - exact(x, 8, weight, bias)).abs().max()
    torchs = (F.silu(F.group_norm(x.contiguous(), 8, weight, bias)).double() - exact(x, 8, weight, bias)).abs().max()
    assert error < max(3 * torchs, 2e-6 * offset)


def test_variance_survives_an_outlier_in_any_chunk(isa):
    x, weight, bias, _ = draw((3, 32, 20, 20))
    x[0, :, 0, 0], x[1, :, 19, 19], x[2, 3, 7, 7] = 1e4, -1e4, 1e5
    got, want = kr_fast.group_norm_silu(x, 8, weight, bias, activation=None), exact(x, 8, weight, bias, activation=None)
    assert ((got.double() - want).abs() / want.abs().clamp_min(0.1)).max() < 1e-4


def test_eps_and_constant_groups(isa):
    x, weight, bias, _ = draw((2, 8, 4, 4))
    x[0] = 3.0
    close(kr_fast.group_norm_silu(x, 2, weight, bias, eps=0.3), exact(x, 2, weight, bias, eps=0.3), torch.float32)
    # A constant group is its bias, to the rounding of 3 / sqrt(eps), which is subtracted from itself.
    got = kr_fast.group_norm_silu(x, 2, weight, bias, activation=None)[0]
    torch.testing.assert_close(got, bias[:, None, None].expand_as(got), rtol=0, atol=3e-4)


def test_silu_at_its_ends(isa):
    """No overflow of the exponential: -1e4 gives 0 and not NaN, 1e4 itself."""
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).contiguous(memory_format=LAST)
    got = kr_fast.group_norm_silu(x, 1, torch.tensor([1e4]), torch.zeros(1), eps=0.0)
    assert got.flatten().tolist() == pytest.approx([0.0, 1e4], abs=1e-30)
    small = kr_fast.group_norm_silu(x, 1, torch.tensor([1e-20]), torch.zeros(1), eps=0.0)
    assert small.flatten().tolist() == pytest.approx([-0.5e-20, 0.5e-20])


def test_nan_and_inf_stay_in_their_group(isa):
    x, weight, bias, _ = draw((2, 32, 4, 4))
    want = kr_fast.group_norm_silu(x, 8, weight, bias)
    x[0, 5, 1, 1], x[1, 31, 0, 0] = float("nan"), float("inf")
    got = kr_fast.group_norm_silu(x, 8, weight, bias)
    assert got[0, 4:8].isnan().all()
    assert got[1, 28:].isnan().all()
    assert torch.equal(got[0, :4], want[0, :4])
    assert torch.equal(got[0, 8:], want[0, 8:])
    assert torch.equal(got[1, :28], want[1, :28])


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_bits_do_not_depend_on_threads_neighbours_or_alignment(isa, shape, groups):
    x, weight, bias, shift = draw((5, *shape[1:]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = kr_fast.group_norm_silu(x, groups, weight, bias, shift=shift)
        torch.set_num_threads(3)
        assert torch.equal(kr_fast.group_norm_silu(x, groups, weight, bias, shift=shift), want)
        for first, last in ((4, 5), (1, 3)):  # fewer samples than threads: each is cut by groups
            part = slice(first, last)
            assert torch.equal(kr_fast.group_norm_silu(x[part], groups, weight, bias, shift=shift[part]), want[part])
    finally:
        torch.set_num_threads(before)
    moved = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert torch.equal(kr_fast.group_norm_silu(moved, groups, weight, bias, shift=shift), want)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 12),
    st.tuples(st.integers(0, 9), st.integers(1, 9)),
    st.integers(0, 40),
    st.sampled_from(TYPES),
    st.booleans(),
)
def test_any_shape(batch, groups, size, pixels, cut, dtype, shifted):
    channels = groups * size
    u, weight, bias, shift = draw((batch, channels, *pixels), dtype=dtype)
    cut = min(cut, channels)
    x, skip = (part.contiguous(memory_format=LAST) for part in (u[:, :cut], u[:, cut:]))
    shift = shift if shifted else None
    got = kr_fast.group_norm_silu(x, groups, weight, bias, skip=skip, shift=shift)
    assert got.shape == u.shape
    if u.numel():
        # Groups of few elements may have a small variance, which enlarges the rounding of the inputs' sum.
        want = exact(u, groups, weight, bias, shift)
        tolerance = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_reference_in_float64():
    x, weight, bias, shift = (t.double() for t in draw((2, 24, 3, 5)))
    got = kr_fast.group_norm_silu(x.contiguous(memory_format=LAST), 4, weight, bias, shift=shift)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact(x, 4, weight, bias, shift), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_reference_agrees_in_each_dtype(reference, dtype):
    x, weight, bias, shift = draw((2, 24, 3, 5), dtype=dtype)
    close(kr_fast.group_norm_silu(x, 4, weight, bias, shift=shift), exact(x, 4, weight, bias, shift), dtype)


def arguments(**change):
    x, weight, bias, _ = draw((2, 8, 3, 3))
    return {"x": x, "groups": 4, "weight": weight, "bias": bias, **change}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 8, 3)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(2, 8, 3, 3)}, ValueError, r"x must be channels_last, got .*strides \(72, 9, 3, 1\)"),
        ({"x": torch.zeros(2, 8, 3, 3).int()}, TypeError, "x must be float32 or bfloat16 or float16 or float64"),
        ({"groups": 3}, ValueError, "groups must divide the 8 channels, got 3"),
        ({"groups": 0}, ValueError, "groups must be in"),
        ({"groups": 2.0}, TypeError, "groups must be an int"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must be contiguous \[8\] on cpu, got float32 \[7\]"),
        ({"weight": torch.zeros(8).double()}, TypeError, "weight must be float32"),
        ({"bias": torch.zeros(16)[::2]}, ValueError, "bias must be contiguous"),
        ({"shift": torch.zeros(2, 7)}, ValueError, r"shift must be \[2, 8\] on cpu"),
        ({"shift": torch.zeros(2, 8, 1, 1)}, ValueError, "shift must have 2 dimensions"),
        ({"skip": torch.zeros(2, 8, 3, 3)}, ValueError, "skip must be channels_last"),
        ({"skip": torch.zeros(2, 8, 3, 4).to(memory_format=LAST)}, ValueError, "skip must match x"),
        ({"skip": torch.zeros(2, 1, 3, 3)}, ValueError, "groups must divide the 9 channels, got 4"),
        ({"eps": -1e-5}, ValueError, "eps must be at least 0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0"),
        ({"activation": "relu"}, ValueError, "activation must be 'silu' or None, got 'relu'"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match="group_norm_silu: " + text):
        kr_fast.group_norm_silu(**arguments(**change))


def test_parameters_that_require_grad_are_taken_without_grad_mode():
    weight = torch.ones(8, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not kr_fast.group_norm_silu(**arguments(weight=weight)).requires_grad


def test_bias_of_another_dtype_is_refused():
    x = draw((2, 8, 3, 3), dtype=torch.bfloat16)[0]
    with pytest.raises(TypeError, match=r"group_norm_silu: bias must have weight's dtype torch.float32, got bfloat16"):
        kr_fast.group_norm_silu(x, 4, torch.zeros(8), torch.zeros(8).bfloat16())


def test_opcheck_and_compile():
    x, weight, bias, shift = draw((2, 8, 3, 3))
    op = torch.ops.kr_fast.group_norm_silu
    wide = torch.cat([weight, weight])
    torch.library.opcheck(op, (x, None, shift, weight, bias, 4, 1e-5, True))
    torch.library.opcheck(op, (x, x.clone(memory_format=LAST), None, wide, wide, 4, 1e-5, False))
    compiled = torch.compile(lambda x: kr_fast.group_norm_silu(x, 4, weight, bias), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), kr_fast.group_norm_silu(x, 4, weight, bias))


@pytest.mark.sanitize
@on_backends("group_norm_silu")
def test_special_sizes_and_addresses(backend):
    x = draw((2, 8, 4, 4))[0].to(backend.device)
    one, zero = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    far = kr_fast.group_norm_silu(x + 1e4, 2, one, zero, activation=None)
    assert (far.double() - exact(x + 1e4, 2, one, zero, activation=None)).abs().max() < 0.02
    moved = torch.empty(x.numel() + 1, device=x.device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    plain = kr_fast.group_norm_silu(moved, 2, None, None)  # not 16-byte aligned
    close(plain, exact(x, 2, one, zero), torch.float32, backend)
    assert kr_fast.group_norm_silu(x[:0], 2, None, None).shape == (0, 8, 4, 4)
    if backend.id == "cuda-host":
        with machine(backend.module, descending=True):  # a missing barrier would show
            assert torch.equal(kr_fast.group_norm_silu(moved, 2, None, None), plain)


def test_groups_that_do_not_fit_a_block_are_refused_by_cuda():
    calls = [GroupNormCall("cpu", torch.float32, size=size) for size in (4096, 4097)]
    with in_use(None):
        why = [registry.refusal("group_norm_silu", "cuda", call) for call in calls]
    assert why == [None, "a group must have at most 4096 channels, got 4097"]
