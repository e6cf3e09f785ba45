"""solver_step on every backend: each term against float64, the bits of the scalar C++, what it takes and emits."""

from typing import NamedTuple

import pytest
import torch
from backends import instruction_set, on_backends
from cuda_on_host import machine, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMIT = ("sample", "kept", "input", "image")
# 1x1x1: less than a lane, or a counter of four; 3x5x5 = 75: vectors and a tail, rows that are not 16-byte aligned;
# 2x4x4: 16-byte rows, several images a Triton program; 3x32x32: whole vectors, several blocks and programs;
# 1x130x130 = 16900: more than one work item an image.
LARGE = (1, 130, 130)
SHAPES = [(1, 1, 1), (3, 5, 5), (2, 4, 4), (3, 32, 32), LARGE]
SMALL = [(3, 5, 5), (2, 4, 4)]


class Case(NamedTuple):
    """A row, with guidance or without."""

    row: SolverRow
    guided: bool = False


CLIP = SolverRow(x0_sample=1.3, x0_model=-0.9, clip=1.0, sample=0.1, model=0.3, x0=0.8)
KEPT = SolverRow(sample=0.9, model=1.5, keep=(0.25, -1.5, 0.0))
HISTORY = (0.5, -0.25, 0.125, -1.5)
EVERYTHING = SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 0.375, HISTORY, keep=(0.25, -1.5, 2.0))
# By the combinations that are compiled apart: guidance, clean image, noise, what is kept, history.
CASES = {
    "two terms": Case(SolverRow(sample=1.02, model=-0.13)),
    "guided": Case(SolverRow(sample=1.02, model=-0.13), True),
    "clip": Case(CLIP),
    "guided clip": Case(CLIP, True),
    "no clip": Case(CLIP._replace(clip=float("inf")), True),
    "thresholding": Case(CLIP._replace(clip=1.75, quantile=0.9, keep=(0.0, 0.0, 1.0)), True),
    "noise": Case(SolverRow(sample=0.9, model=-0.2, noise=0.4)),
    "guided clip and noise": Case(CLIP._replace(clip=0.5, noise=0.2), True),
    "history": Case(SolverRow(sample=0.9, model=1.5, history=(-0.75,)), True),
    "kept": Case(KEPT, True),
    "kept and history": Case(KEPT._replace(history=(-0.75,))),
    "guided, kept and history": Case(KEPT._replace(history=(-0.75,)), True),
    "kept clean alone": Case(CLIP._replace(x0=0.0, keep=(0.0, 0.0, 1.0))),
    "everything": Case(EVERYTHING, True),
    "everything but guidance": Case(EVERYTHING),
}


def check_regime(backend, shape):
    if shape == LARGE and backend.id == "triton-interpreter":
        pytest.skip("3x32x32 has several programs already")


def inputs(shape, row, guided=True, batch=3, device="cpu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(batch, *shape, generator=draw) for _ in range(3 + len(row.history))]
    x, m, u, *history = (each.to(device, dtype) for each in tensors)
    ids = torch.tensor([5, 2**33 + 1, 0, *range(10, 7 + batch)])[:batch].to(device)
    more = {"uncond_output": u, "guidance_scale": 2.5} if guided else {}
    return x, m, {"history": tuple(history), "ids": ids, "seed": 2**40 + 9, "stream": 4, **more}


def oracle(x, m, row, *, history, ids, seed, stream, uncond_output=None, guidance_scale=1.0):
    """The docstring's formula in float64, with the noise of philox_normal: the next sample, and what is kept."""
    x, m = x.double(), m.double()
    e = m if uncond_output is None else uncond_output.double() + guidance_scale * (m - uncond_output.double())
    clean = row.x0_sample * x + row.x0_model * e
    if row.quantile:  # Saharia et al., 2022, section 2.3, as diffusers' _threshold_sample computes it
        limit = clean.flatten(1).abs().quantile(row.quantile, dim=1).clamp(1, row.clip).view(-1, 1, 1, 1)
        clean = clean.clamp(-limit, limit) / limit
    else:
        clean = clean.clamp(-row.clip, row.clip)
    y = row.sample * x + row.model * e + row.x0 * clean
    y = y + sum(c * h.double() for c, h in zip(row.history, history, strict=True))
    y = y + row.noise * kr_fast.philox_normal(ids, x.shape[1:], seed=seed, stream=stream).double()
    return y, None if row.keep is None else row.keep[0] * x + row.keep[1] * e + row.keep[2] * clean


def close(got, expected):
    # Sums of at most ten terms of size about 1 in float32: 1e-6 is a few roundings of the largest.
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=4e-6)


def on_scalar(x, m, row, **options):
    """The same call by the scalar C++ on the CPU."""
    options = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    options["history"] = tuple(h.cpu() for h in options.get("history", ()))
    with registry.forced("cpu"), instruction_set("scalar"):
        return solver_step(x.cpu(), m.cpu(), row, **options)


def same(got, expected):
    """Equal bits, dtypes and strides."""
    got = got.cpu()
    return got.stride() == expected.stride() and same_bits(got.contiguous().view(-1), expected.contiguous().view(-1))


def all_same(got, expected):
    return all(same(a, b) for a, b in zip(got, expected, strict=True) if b is not None)


@on_backends("solver_step")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_term(backend, shape, name):
    check_regime(backend, shape)
    row, guided = CASES[name]
    x, m, options = inputs(shape, row, guided, device=backend.device)
    before = [t.clone() for t in (x, m, *options["history"])]
    emit = ("sample", "kept", "image") if row.keep else ("sample", "image")
    got, (y, kept) = solver_step(x, m, row, **options, emit=emit), oracle(x, m, row, **options)
    close(got.sample, y)
    if row.keep:
        close(got.kept, kept)
    assert torch.equal(got.image, kr_fast.pack_uint8(got.sample))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, m, *options["history"]), strict=True))
    limits_of_a_gpu = row.quantile and x.is_cuda  # torch's order statistics there
    if backend.name != "reference" and not limits_of_a_gpu:
        assert all_same(got, on_scalar(x, m, row, **options, emit=emit))


@on_backends("solver_step")
@pytest.mark.parametrize("quantile", [0.5, 0.995, 1.0])
def test_thresholds_below_within_and_above_the_limits(backend, quantile):
    row = CASES["thresholding"].row._replace(quantile=quantile)
    x, m, options = inputs((3, 7, 7), row, device=backend.device)
    x = x * torch.tensor([0.1, 1.0, 3.0], device=x.device).view(3, 1, 1, 1)
    got = solver_step(x, m, row, **options, emit=("sample", "kept"))
    for value, expected in zip(got, oracle(x, m, row, **options), strict=False):
        close(value, expected)


@pytest.mark.sanitize
@on_backends("solver_step")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 2)], ids=str)
def test_network_input_and_bytes(backend, shape, dtype, copies):
    check_regime(backend, shape)
    x, m, options = inputs(shape, EVERYTHING, device=backend.device)
    whole = solver_step(x, m, EVERYTHING, **options, emit=EMIT, input_dtype=dtype, copies=copies)
    assert whole.input.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole.input, (0.375 * whole.sample).to(dtype).repeat(copies, 1, 1, 1))
    assert torch.equal(whole.image, kr_fast.pack_uint8(whole.sample))
    alone = solver_step(x, m, EVERYTHING, **options, emit=("image", "input"), input_dtype=dtype, copies=copies)
    assert alone.sample is None
    assert torch.equal(alone.input, whole.input)
    assert torch.equal(alone.image, whole.image)


@on_backends("solver_step")
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("other", LAYOUTS, ids=str)
def test_outputs_of_the_network_in_any_dtype_and_layout(backend, shape, dtype, layout, other):
    x, m, options = inputs(shape, EVERYTHING, device=backend.device)
    m, u = m.to(dtype), options.pop("uncond_output").to(dtype)
    expected = solver_step(x, m.float(), EVERYTHING, uncond_output=u.float(), **options)
    m, u = m.contiguous(memory_format=layout), u.contiguous(memory_format=other)
    options["history"] = tuple(h.contiguous(memory_format=other) for h in options["history"])
    assert torch.equal(solver_step(x, m, EVERYTHING, uncond_output=u, **options), expected)


@on_backends("solver_step")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_reads_and_writes_every_kind_of_number(backend, dtype):
    """Every finite 16-bit number on the way in; ties, overflow, subnormals, signed zeros, NaN on the way out."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    if backend.id == "triton-interpreter":  # which takes subnormals of bfloat16 for 0
        every = every[(every == 0) | (every.abs() >= torch.finfo(dtype).smallest_normal)]
    m = every[: len(every) // 64 * 64].view(1, 1, 64, -1).to(backend.device)
    x = torch.zeros_like(m, dtype=torch.float32)
    got = solver_step(x, m, SolverRow(model=1.0), emit=("sample", "input"), input_dtype=dtype)
    assert torch.equal(got.sample, m.float())
    assert torch.equal(got.input, m)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], dtype=torch.int32)
    bits = torch.arange(0, 2**31 - 2**24, 4097 * 13, dtype=torch.int64).to(torch.int32)
    x = torch.cat([ties, bits]).view(torch.float32).to(backend.device)
    x = torch.cat([x, -x]).view(1, 1, 2, -1)
    got = solver_step(x, torch.zeros_like(x), SolverRow(sample=1.0), emit=("input",), input_dtype=dtype).input
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@on_backends("solver_step")
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_written_into_given_tensors(backend, shape):
    x, m, options = inputs(shape, EVERYTHING, device=backend.device)
    expected = solver_step(x, m, EVERYTHING, **options, emit=EMIT, input_dtype=torch.float16)
    out = SolverOutput(x, *(torch.empty_like(t) for t in expected[1:]))
    assert solver_step(x, m, EVERYTHING, **options, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))  # x among them: written in place


@pytest.mark.sanitize
@on_backends("solver_step")
@pytest.mark.parametrize("which", ["sample", "model_output", "history"])
def test_any_address_may_be_unaligned(backend, which):
    """Rows of whole 16 bytes, and one tensor whose base is not; views with gaps too."""
    x, m, options = inputs((2, 4, 4), EVERYTHING, device=backend.device)
    expected = solver_step(x, m, EVERYTHING, **options)

    def moved(t):
        return torch.empty(t.numel() + 1, device=t.device)[1:].view_as(t).copy_(t)

    if which == "history":
        options["history"] = (*options["history"][:3], moved(options["history"][3]))
    x, m = moved(x) if which == "sample" else x, moved(m) if which == "model_output" else m
    assert torch.equal(solver_step(x, m, EVERYTHING, **options), expected)
    wide = torch.empty(6, *x.shape[1:], device=x.device)[::2].copy_(m)
    assert torch.equal(solver_step(x, wide, EVERYTHING, **options), expected)


@on_backends("solver_step")
@pytest.mark.parametrize("batch", [0, 1, 300])
def test_any_number_of_images_of_any_rank(backend, batch):
    row = CASES["noise"].row
    x, m, options = inputs((6,), row, False, batch, backend.device)
    close(solver_step(x, m, row, **options), oracle(x, m, row, **options)[0])


@on_backends("solver_step")
def test_noise_is_that_of_philox_normal(backend):
    x, ids = torch.zeros(4, 3, 5, 5).to(backend.device), torch.tensor([3, 1, 2**40, 0]).to(backend.device)
    got = solver_step(x, x, SolverRow(noise=1.0), ids=ids, seed=77, stream=6)
    assert torch.equal(got, kr_fast.philox_normal(ids, (3, 5, 5), seed=77, stream=6))


@on_backends("solver_step")
def test_nan_inf_and_clipped_values(backend):
    x, m = torch.zeros(1, 1, 5, 5).to(backend.device), torch.zeros(1, 1, 5, 5).to(backend.device)
    m[0, 0, 0, 0], m[0, 0, 4, 4], x[0, 0, 2, 2] = float("nan"), float("inf"), float("-inf")
    y = solver_step(x, m, CLIP)
    assert torch.isnan(y[0, 0, 0, 0])
    assert y[0, 0, 4, 4] == float("inf")
    assert y[0, 0, 2, 2] == float("-inf")
    assert torch.isfinite(y).sum() == 22
    x, m, options = inputs((3, 5, 5), CLIP, False, device=backend.device)
    torch.testing.assert_close(
        solver_step(50 * x, m, CLIP).double(), oracle(50 * x, m, CLIP, **options)[0], rtol=2e-6, atol=1e-5
    )
    row = SolverRow(x0_sample=2.0, x0_model=1.0, x0=0.5, sample=1.0)  # clip = inf
    large = torch.full((1, 1, 3, 3), 1e30).to(backend.device)
    assert torch.equal(solver_step(large, torch.full_like(large, 4.0), row), 2 * large)


@on_backends("solver_step", "cpu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_neighbours_or_threads(backend, by_threads, shape):
    x, m, options = inputs(shape, EVERYTHING, batch=37)
    whole, *others = by_threads(lambda: solver_step(x, m, EVERYTHING, **options))
    assert all(torch.equal(whole, each) for each in others)
    part = slice(11, 13)
    alone = {**options, "ids": options["ids"][part], "uncond_output": options["uncond_output"][part].clone()}
    alone["history"] = tuple(h[part].clone() for h in options["history"])
    assert torch.equal(whole[part], solver_step(x[part].clone(), m[part].clone(), EVERYTHING, **alone))


@pytest.mark.sanitize
@on_backends("solver_step", "cuda-host")
@pytest.mark.parametrize("most_blocks", [1, 3])
def test_grid_strides_and_order_do_not_matter(backend, most_blocks):
    x, m, options = inputs((3, 20, 20), EVERYTHING, batch=5)
    with machine(backend.module, descending=True, most_blocks=most_blocks):
        got = solver_step(x, m, EVERYTHING, **options, emit=EMIT, copies=2)
    assert all_same(got, on_scalar(x, m, EVERYTHING, **options, emit=EMIT, copies=2))


def test_reference_in_float64():
    x, m, options = inputs((3, 5, 5), EVERYTHING, dtype=torch.float64)
    got = solver_step(x, m, EVERYTHING, **options)
    assert got.dtype == torch.float64
    expected = oracle(x, m, EVERYTHING, **options)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # noise is float32 in one


finite = st.floats(-2, 2, width=32)
coefficients = st.tuples(finite, finite, st.floats(0, 3, width=32), *[finite] * 4)


@settings(max_examples=60, deadline=None)
@given(coefficients, st.lists(finite, max_size=4), st.integers(0, 4), st.integers(1, 40), st.booleans())
def test_any_row(numbers, history, batch, numel, guided):
    row = SolverRow(*numbers, 1.0, tuple(history))
    x, m, options = inputs((1, 1, numel), row, guided, batch)
    got, (expected, _) = solver_step(x, m, row, **options), oracle(x, m, row, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sample": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "sample must be float32 or float64, got int64"),
        ({"sample": torch.zeros(3, 2).t()}, ValueError, r"sample must be contiguous \[B, \.\.\.\]"),
        ({"model_output": torch.zeros(2, 4)}, ValueError, r"model_output must be like sample \(float32 \[2, 3\]"),
        (
            {"model_output": torch.zeros(2, 3).double()},
            TypeError,
            "model_output must be float32 or bfloat16 or float16, got",
        ),
        ({"uncond_output": torch.zeros(3, 3)}, ValueError, "uncond_output must be like sample"),
        ({"history": (torch.zeros(2, 3),)}, ValueError, "history must hold the row's 0"),
        (
            {"row": SolverRow(history=(1.0,) * 5), "history": (torch.zeros(2, 3),) * 5},
            ValueError,
            r"history must hold the row's 5 \(at most 4\) tensors, got 5",
        ),
        ({"row": SolverRow(history=(1.0,)), "history": (torch.zeros(2, 2),)}, ValueError, r"history\[0\] must be like"),
        ({"row": SolverRow(noise=1.0)}, TypeError, "ids must be given for a step with noise, got None"),
        ({"row": SolverRow(noise=1.0), "ids": torch.arange(3)}, ValueError, r"ids must be \[2\] on cpu"),
        ({"row": SolverRow(noise=1.0), "ids": torch.zeros(2)}, TypeError, "ids must be int64"),
        ({"row": SolverRow(noise=1.0), "ids": torch.tensor([0, -1])}, ValueError, "ids must be at least 0, got -1"),
        ({"emit": ()}, ValueError, "emit must name some of sample, kept, input, image, each once"),
        ({"emit": ("sample", "sample")}, ValueError, "emit must name some of"),
        ({"emit": ("noise",)}, ValueError, "emit must name some of"),
        ({"emit": ("kept",)}, ValueError, "row must have keep where kept is emitted, got None"),
        ({"emit": ("image",)}, ValueError, r"sample must be float32 \[B, C, H, W\] where input or image is emitted"),
        ({"input_dtype": torch.int8}, ValueError, "input_dtype must be float32, bfloat16 or float16, got torch.int8"),
        ({"copies": 0}, ValueError, "copies must be in"),
        ({"row": SolverRow(quantile=0.9)}, ValueError, r"row must have quantile in \(0, 1\] and a finite clip"),
        (
            {"uncond_output": torch.zeros(2, 3, dtype=torch.float16)},
            ValueError,
            r"uncond_output must have model_output's dtype \(torch.float32\), got float16",
        ),
        (
            {"out": SolverOutput(torch.zeros(3, 2))},
            ValueError,
            r"out.sample must be float32 \[2, 3\] on cpu, contiguous",
        ),
        (
            {"out": SolverOutput(torch.zeros(3, 2).t())},
            ValueError,
            r"out.sample must be float32 \[2, 3\] on cpu, conti",
        ),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"stream": 2**32}, ValueError, "stream must be in"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    call = {"sample": torch.zeros(2, 3), "model_output": torch.zeros(2, 3), "row": SolverRow(sample=1.0), **change}
    with pytest.raises(error, match="solver_step: " + text):
        solver_step(**call)


def test_opcheck_and_compile():
    row = CASES["everything"].row
    x, m, options = inputs((1, 4, 4), row)
    emit = ["sample", "kept", "input", "image"]
    given = (x, m, options["uncond_output"], options["ids"], None, list(options["history"]), row.numbers(), 2.5, 9, 4)
    torch.library.opcheck(torch.ops.kr_fast.solver_step, (*given, 2, emit, torch.bfloat16))
    images = torch.empty(3, 4, 4, 1, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.kr_fast.solver_step_out, (*given, 1, torch.empty_like(x), torch.empty_like(x), None, images)
    )
    limits, plain = torch.tensor([1.0, 1.5, 2.0]), CLIP.numbers()
    torch.library.opcheck(
        torch.ops.kr_fast.solver_step,
        (x, m, None, None, limits, [], plain, 1.0, 0, 0, 1, ["image"], torch.float32),
    )
    compiled = torch.compile(lambda x, m: solver_step(x, m, row, **options), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, m), solver_step(x, m, row, **options))
