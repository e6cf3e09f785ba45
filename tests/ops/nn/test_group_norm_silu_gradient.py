"""The gradient of group_norm_silu: against float64 by regime, special values, upstream gradients, threads, compile."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.arguments import GroupNorm, GroupNormGradient
from kr_fast.backends.cpu.nn import group_norm_relu, group_norm_relu_sample_gradients, group_norm_sample_gradients

LAST = torch.channels_last
# (N, C1, C2, H, W), groups by regime. C++: one pixel and a part of a vector alone; 32 channels, one block of AVX-512;
# 2 channels a group; 104, blocks of 2 and 1 vectors and a part; one group, and groups of one channel; several chunks of
# pixels with a tail; a group across both sources, of whole vectors and of parts; fewer samples than threads.
CASES = [
    ((3, 5, 0, 1, 2), 1),
    ((4, 32, 0, 8, 8), 8),
    ((3, 64, 0, 7, 7), 32),
    ((2, 104, 0, 5, 3), 13),
    ((2, 24, 0, 3, 3), 24),
    ((1, 40, 0, 33, 31), 4),
    ((3, 64, 32, 5, 6), 32),
    ((2, 17, 7, 5, 6), 6),
]
NAMES = ("x", "skip", "shift", "weight", "bias")


def draw(shape, shifted=True, offset=0.0, dtype=torch.float32):
    """x, skip, shift, weight, bias, and a gradient of y."""
    n, first, second, *size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    image = lambda c: normal(n, c, *size).to(dtype).contiguous(memory_format=LAST)  # noqa: E731
    total = first + second
    x, skip = (2 * image(first) + offset).contiguous(memory_format=LAST), image(second) if second else None
    shift = normal(n, total).to(dtype) if shifted else None
    return [x, skip, shift, normal(total).to(dtype), normal(total).to(dtype)], image(total)


def ours(x, skip, shift, weight, bias, groups, activation="silu"):
    return kr_fast.group_norm_silu(x, groups, weight, bias, shift=shift, skip=skip, activation=activation)


def torchs(x, skip, shift, weight, bias, groups, activation="silu"):
    """The layers one after the other, in the inputs' dtype."""
    u = x if skip is None else torch.cat([x, skip], 1)
    u = u if shift is None else u + shift[:, :, None, None]
    y = F.group_norm(u, groups, weight, bias)
    return F.silu(y) if activation else y


def everything(function, inputs, grad, groups, activation="silu", dtype=None, device=None):
    """y and the gradients of all inputs."""
    inputs = [None if each is None else each.detach().to(device, dtype).requires_grad_() for each in inputs]
    y = function(*inputs, groups, activation)
    return [y.detach(), *torch.autograd.grad(y, [each for each in inputs if each is not None], grad.to(device, dtype))]


def no_worse(result, torchs, expected, dtype=torch.float32):
    """The largest error of each is at most three times torch's in this dtype, or its last place."""
    for mine, other, right in zip(result, torchs, expected, strict=True):
        error, limit = ((each.double().cpu() - right).abs().max() for each in (mine, other))
        last_place = 2 * torch.finfo(dtype).eps * max(right.abs().max(), 1)
        assert error <= 3 * max(limit, last_place), (error, limit)


@on_backends("group_norm_silu", "reference", "cpu", "triton")
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(backend, shape, groups, dtype):
    for activation, shifted in (("silu", True), ("silu", False), (None, True)):
        inputs, grad = draw(shape, shifted, dtype=dtype)
        before = [None if each is None else each.clone() for each in (*inputs, grad)]
        result = everything(ours, inputs, grad, groups, activation, device=backend.device)
        assert [each.dtype for each in result] == [dtype] * len(result)
        assert result[1].is_contiguous(memory_format=LAST)
        expected = everything(torchs, inputs, grad, groups, activation, torch.float64)
        no_worse(result, everything(torchs, inputs, grad, groups, activation), expected, dtype)
        for each, was in zip((*inputs, grad), before, strict=True):
            assert was is None or torch.equal(each, was)


@on_backends("group_norm_silu", "reference", "cpu", "triton")
def test_a_mean_far_from_zero(backend):
    inputs, grad = draw((3, 16, 16, 9, 9), offset=1e3)
    inputs[1] = inputs[1] + 1e3
    result = everything(ours, inputs, grad, 4, device=backend.device)
    no_worse(result, everything(torchs, inputs, grad, 4), everything(torchs, inputs, grad, 4, dtype=torch.float64))


def test_the_forward_pass_that_keeps_statistics_has_the_same_bits(isa):
    for shape, groups in CASES:
        inputs, _ = draw(shape)
        learning = [None if each is None else each.clone().requires_grad_() for each in inputs]
        assert torch.equal(ours(*learning, groups), ours(*inputs, groups))


@pytest.mark.parametrize("needed", NAMES)
def test_each_gradient_alone(isa, needed):
    inputs, grad = draw((3, 17, 7, 5, 6))
    every = [each.clone().requires_grad_() for each in inputs]
    expected = dict(zip(NAMES, torch.autograd.grad(ours(*every, 6), every, grad), strict=True))
    given = [each.clone().requires_grad_(name == needed) for name, each in zip(NAMES, inputs, strict=True)]
    (result,) = torch.autograd.grad(ours(*given, 6), [given[NAMES.index(needed)]], grad)
    assert torch.equal(result, expected[needed])


def test_half_precision_with_parameters_in_float32(isa):
    inputs, grad = draw((2, 40, 0, 5, 5), dtype=torch.bfloat16)
    single = draw((2, 40, 0, 5, 5))[0]
    inputs = [*inputs[:2], *single[2:]]
    learning = [None if each is None else each.requires_grad_() for each in inputs]
    result = torch.autograd.grad(ours(*learning, 4), [each for each in learning if each is not None], grad)
    assert [each.dtype for each in result] == [torch.bfloat16, *[torch.float32] * 3]
    _, _, *expected = everything(torchs, [None if e is None else e.double() for e in inputs], grad.double(), 4)
    for each, right in zip(result[1:], expected, strict=True):
        torch.testing.assert_close(each.double(), right, rtol=1e-5, atol=1e-4)


def test_without_weight_or_bias(isa):
    (x, _, _, _, _), grad = draw((2, 24, 0, 5, 5))
    x.requires_grad_()
    one, zero = torch.ones(24), torch.zeros(24)
    (result,) = torch.autograd.grad(kr_fast.group_norm_silu(x, 4, None, None), x, grad)
    assert torch.equal(result, torch.autograd.grad(kr_fast.group_norm_silu(x, 4, one, zero), x, grad)[0])


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_bits_do_not_depend_on_threads_or_alignment(isa, shape, groups):
    inputs, grad = draw(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(ours, inputs, grad, groups)
        for threads in (2, 5):  # also more than samples, which are then cut by groups
            torch.set_num_threads(threads)
            for a, b in zip(everything(ours, inputs, grad, groups), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    moved = torch.empty(grad.numel() + 1)[1:].as_strided(grad.shape, grad.stride()).copy_(grad)
    for a, b in zip(everything(ours, inputs, moved, groups), expected, strict=True):
        assert torch.equal(a, b)


def test_any_layout_of_the_upstream_gradient(isa):
    inputs, grad = draw((3, 64, 32, 5, 6))
    expected = everything(ours, inputs, grad, 32)
    for other in (grad.contiguous(), grad.repeat(1, 1, 2, 2)[:, :, :5, :6]):
        for a, b in zip(everything(ours, inputs, other, 32), expected, strict=True):
            assert torch.equal(a, b)
    shared, ones = torch.ones(()).expand(grad.shape), torch.ones_like(grad)
    for a, b in zip(*(everything(ours, inputs, each, 32) for each in (shared, ones)), strict=True):
        assert torch.equal(a, b)


def test_nan_and_inf_stay_in_their_group(isa):
    inputs, grad = draw((2, 32, 0, 4, 4))
    _, expected, shift, weight, _ = everything(ours, inputs, grad, 8)
    inputs[0][0, 5, 1, 1], grad[1, 31, 0, 0] = float("nan"), float("inf")
    _, dx, dshift, dweight, _ = everything(ours, inputs, grad, 8)
    assert dx[0, 4:8].isnan().all()
    assert not dx[1, 28:].isfinite().any()
    for result, clean in ((dx, expected), (dshift, shift)):
        assert torch.equal(result[0, :4], clean[0, :4])
        assert torch.equal(result[0, 8:], clean[0, 8:])
        assert torch.equal(result[1, :28], clean[1, :28])
    assert torch.equal(dweight[8:28], weight[8:28])


def test_silu_at_its_ends(isa):
    """Far below 0 the slope is 0, far above it 1, without overflow of the exponential."""
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).contiguous(memory_format=LAST)
    weight = torch.tensor([1e4], requires_grad=True)
    kr_fast.group_norm_silu(x, 1, weight, torch.zeros(1), eps=0.0).sum().backward()
    assert weight.grad.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("shape", [(0, 8, 0, 3, 3), (2, 8, 0, 0, 3), (2, 0, 8, 3, 3)])
def test_empty(shape):
    inputs, grad = draw(shape)
    y, *grads = everything(ours, inputs, grad, 4)
    assert y.shape == grad.shape
    assert [each.shape for each in grads] == [each.shape for each in inputs if each is not None]
    if y.numel() == 0:
        assert all(each.abs().sum() == 0 for each in grads)


def test_cuda_sources_refuse_to_train():
    inputs, _ = draw((2, 8, 0, 3, 3))
    learning = [None if each is None else each.requires_grad_() for each in inputs]
    with registry.forced("cuda"), pytest.raises(RuntimeError, match="group_norm_silu: KR_FAST_BACKEND=cuda cannot run"):
        ours(*learning, 4)


def test_opcheck_and_compile():
    inputs, grad = draw((2, 8, 8, 3, 3))
    learning = [each.clone().requires_grad_() for each in inputs]
    torch.library.opcheck(torch.ops.kr_fast.group_norm_silu_forward, (*learning, 4, 1e-5, True))
    found = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        learning = [each.clone().requires_grad_() for each in inputs]
        y = function(*learning, 4)
        found.append((y, *torch.autograd.grad(y, learning, grad)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "groups"), CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_each_sample(shape, groups, threads):
    """Those of weight and bias apart by sample, which private training clips: each as of a batch of its own."""
    pytest.importorskip("kr_fast._cpu", reason="kr_fast._cpu is not built")
    tensors, upstream = draw(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, mean, rstd = torch.ops.kr_fast.group_norm_silu_forward(*tensors, groups, 1e-5, True)
        call = GroupNormGradient(upstream, *tensors, mean, rstd, groups, True)
        *signals, samples = group_norm_sample_gradients(call)
        expected = torch.ops.kr_fast.group_norm_silu_backward(*call)
        assert all(torch.equal(each, other) for each, other in zip(signals, expected, strict=False) if each is not None)
        torch.testing.assert_close(samples.sum(0), torch.stack(expected[3:]), rtol=1e-5, atol=1e-5)
        for n in range(shape[0]):
            alone = [None if each is None else each[n : n + 1] for each in tensors[:3]] + tensors[3:]
            one = GroupNormGradient(upstream[n : n + 1], *alone, mean[n : n + 1], rstd[n : n + 1], groups, True)
            assert torch.equal(samples[n], torch.stack(torch.ops.kr_fast.group_norm_silu_backward(*one)[3:]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "groups"), [case for case in CASES if not case[0][2]])
@pytest.mark.parametrize("summed", [False, True])
def test_relu_in_the_place_of_silu(isa, shape, groups, summed):
    """With and without a residual: y and gradients against float64, those of weight and bias by sample."""
    (x, _, _, weight, bias), upstream = draw(shape)
    residual = draw(shape)[1].flip(0).contiguous(memory_format=LAST) if summed else None
    y, mean, rstd = group_norm_relu(GroupNorm(x, None, None, weight, bias, groups, 1e-5, False), residual)
    exact = [each.double().requires_grad_() for each in (x, weight, bias, torch.zeros_like(upstream))]
    norms = [F.group_norm(row[None], groups, *exact[1:3]) for row in exact[0]]  # one by one, for gradients by sample
    before = torch.cat(norms) + exact[3] + (0 if residual is None else residual.double())
    torch.testing.assert_close(y.double(), before.relu().detach(), rtol=0, atol=1e-5)
    found = torch.where(y > 0, upstream, 0).double()  # what ReLU passes where y, rounded, is above 0
    call = GroupNormGradient(upstream, x, None, None, weight, bias, mean, rstd, groups, False)
    by_x, passed, samples = group_norm_relu_sample_gradients(call, y, summed)
    assert (passed is None) == (not summed)
    assert passed is None or torch.equal(passed.double(), found)
    (expected,) = torch.autograd.grad(before, exact[:1], found, retain_graph=True)
    torch.testing.assert_close(by_x.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for n, norm in enumerate(norms):
        expected = torch.stack(torch.autograd.grad(norm, exact[1:3], found[n : n + 1]))
        torch.testing.assert_close(samples[n].double(), expected, rtol=0, atol=1e-5 * float(1 + expected.abs().max()))


def test_relu_passes_what_is_not_finite(isa):
    """As torch's: a record that is not finite is found by its gradient."""
    x, ones = torch.randn(3, 16, 4, 4).contiguous(memory_format=LAST), torch.ones(16)
    x[1, 3, 0, 0] = float("nan")
    y, mean, rstd = group_norm_relu(GroupNorm(x, None, None, ones, ones, 4, 1e-5, False), None)
    assert torch.equal(y.isnan(), F.group_norm(x, 4, ones, ones).isnan())
    call = GroupNormGradient(torch.ones_like(x), x, None, None, ones, ones, mean, rstd, 4, False)
    by_x, _, samples = group_norm_relu_sample_gradients(call, y, False)
    assert by_x[1].isnan().any()
    assert samples.isfinite().all((1, 2)).tolist() == [True, False, True]
    assert by_x[[0, 2]].isfinite().all()
