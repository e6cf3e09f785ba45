"""solver_step: every term against float64, equal bits on every instruction set and GPU, and its arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step

_cpu = pytest.importorskip("kr_fast._cpu", reason="kr_fast._cpu is not built")
# 1x1x1: less than a lane; 3x5x5 = 75: vectors and a tail; 1x8x8: digits; 3x32x32: whole vectors only;
# 1x130x130 = 16900: more than one work item an image.
SHAPES = [(1, 1, 1), (3, 5, 5), (1, 8, 8), (3, 32, 32), (1, 130, 130)]
ROWS = {
    "two terms": SolverRow(sample=1.02, model=-0.13),
    "clip": SolverRow(x0_sample=1.3, x0_model=-0.9, clip=1.0, sample=0.1, model=0.3, x0=0.8),
    "noise": SolverRow(sample=0.9, model=-0.2, noise=0.4),
    "clip and noise": SolverRow(x0_sample=1.3, x0_model=-0.9, clip=0.5, sample=0.1, model=0.3, x0=0.8, noise=0.2),
    "history": SolverRow(sample=0.9, model=1.5, history=(-0.75,)),
    "everything": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 1.0, (0.5, -0.25, 0.125, -1.5)),
}


def inputs(shape, row, batch=3, guided=True, dtype=torch.float32):
    draw = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(batch, *shape, generator=draw) for _ in range(3 + len(row.history))]
    x, cond, uncond, *history = (t.to(dtype) for t in tensors)
    ids = torch.tensor([5, 2**33 + 1, 0, *range(10, 7 + batch)])[:batch]
    more = {"uncond_output": uncond, "guidance_scale": 2.5} if guided else {}
    return (x, cond, row), {"history": tuple(history), "ids": ids, "seed": 9, "stream": 4, **more}


def oracle(x, m, row, *, history, ids, seed, stream, uncond_output=None, guidance_scale=1.0):
    """The docstring's formula in float64, with the noise of philox_normal."""
    x, m = x.double(), m.double()
    e = m if uncond_output is None else uncond_output.double() + guidance_scale * (m - uncond_output.double())
    y = row.sample * x + row.model * e + row.x0 * (row.x0_sample * x + row.x0_model * e).clamp(-row.clip, row.clip)
    y = y + sum(c * h.double() for c, h in zip(row.history, history, strict=True))
    return y + row.noise * kr_fast.philox_normal(ids, x.shape[1:], seed=seed, stream=stream).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("guided", [False, True])
def test_against_float64(isa, shape, name, guided):
    arguments, options = inputs(shape, ROWS[name], guided=guided)
    before = [t.clone() for t in (*arguments[:2], *options["history"])]
    got = solver_step(*arguments, **options)
    # Sums of at most ten terms of size about 1 in float32: 1e-6 is a few roundings of the largest.
    torch.testing.assert_close(got.double(), oracle(*arguments, **options), rtol=2e-6, atol=4e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (*arguments[:2], *options["history"]), strict=True))


def test_against_float64_where_most_values_are_clipped(isa):
    (x, m, row), options = inputs((3, 5, 5), ROWS["clip"], guided=False)
    got = solver_step(50 * x, m, row, **options)
    torch.testing.assert_close(got.double(), oracle(50 * x, m, row, **options), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_bits_do_not_depend_on_the_instruction_set(shape, name):
    arguments, options = inputs(shape, ROWS[name])
    before, found = _cpu.isa(), []
    try:
        for level in _cpu.isa_available():
            _cpu.set_isa(level)
            found.append(solver_step(*arguments, **options).view(torch.int32))
    finally:
        _cpu.set_isa(before)
    assert all(torch.equal(found[0], each) for each in found)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_neighbours_or_threads(isa, shape):
    (x, m, row), options = inputs(shape, ROWS["everything"], batch=37)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = solver_step(x, m, row, **options)
        torch.set_num_threads(1)
        assert torch.equal(whole, solver_step(x, m, row, **options))
    finally:
        torch.set_num_threads(before)
    part = slice(11, 13)
    alone = {**options, "ids": options["ids"][part], "uncond_output": options["uncond_output"][part].clone()}
    alone["history"] = tuple(h[part].clone() for h in options["history"])
    assert torch.equal(whole[part], solver_step(x[part].clone(), m[part].clone(), row, **alone))


def test_noise_is_that_of_philox_normal(isa):
    x = torch.zeros(4, 3, 5, 5)
    ids = torch.tensor([3, 1, 2**40, 0])
    got = solver_step(x, x, SolverRow(noise=1.0), ids=ids, seed=77, stream=6)
    assert torch.equal(got, kr_fast.philox_normal(ids, (3, 5, 5), seed=77, stream=6))


def test_nan_and_inf_come_out(isa):
    x, m = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    m[0, 0, 0, 0], m[0, 0, 4, 4], x[0, 0, 2, 2] = float("nan"), float("inf"), float("-inf")
    y = solver_step(x, m, ROWS["clip"])
    assert torch.isnan(y[0, 0, 0, 0])
    assert y[0, 0, 4, 4] == float("inf")
    assert y[0, 0, 2, 2] == float("-inf")
    assert torch.isfinite(y).sum() == 22


def test_unclipped_x0_and_empty_batch(isa):
    row = SolverRow(x0_sample=2.0, x0_model=1.0, x0=0.5, sample=1.0)  # clip = inf
    x, m = torch.full((1, 1, 3, 3), 1e30), torch.full((1, 1, 3, 3), 4.0)
    assert torch.equal(solver_step(x, m, row), torch.full((1, 1, 3, 3), 2e30))
    assert solver_step(x[:0], m[:0], row).shape == (0, 1, 3, 3)


def test_inputs_with_other_strides_are_read_right(isa):
    (x, m, row), options = inputs((3, 6, 4), ROWS["everything"])
    want = solver_step(x, m, row, **options)
    last = torch.channels_last
    history = tuple(h.contiguous(memory_format=last) for h in options["history"])
    uncond = options["uncond_output"].contiguous(memory_format=last)
    got = solver_step(
        x, m.contiguous(memory_format=last), row, **{**options, "uncond_output": uncond, "history": history}
    )
    assert torch.equal(got, want)
    wide = torch.empty(7, *x.shape[1:])
    wide[::2][:3] = m
    assert torch.equal(solver_step(x, wide[::2][:3], row, **options), want)
    unaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert torch.equal(solver_step(unaligned, m, row, **options), want)


def test_reference_in_float64():
    arguments, options = inputs((3, 5, 5), ROWS["everything"], dtype=torch.float64)
    got = solver_step(*arguments, **options)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracle(*arguments, **options), rtol=0, atol=1e-6)  # noise is float32 in one


KEPT = {
    "kept": SolverRow(sample=0.9, model=1.5, keep=(0.25, -1.5, 0.0)),
    "kept and history": SolverRow(sample=0.9, model=1.5, history=(-0.75,), keep=(0.25, -1.5, 0.0)),
    "kept clean": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 1.0, (0.5, 0.2), keep=(0.25, -1.5, 2.0)),
    "kept clean alone": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.0, 0.0, 1.0, keep=(0.0, 0.0, 1.0)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("guided", [False, True])
def test_kept_against_float64(isa, shape, name, guided):
    row = KEPT[name]
    arguments, options = inputs(shape, row, guided=guided)
    got = solver_step(*arguments, **options, emit=("kept", "sample"))
    torch.testing.assert_close(got.sample.double(), oracle(*arguments, **options), rtol=2e-6, atol=4e-6)
    x, m = (t.double() for t in arguments[:2])
    u = options.get("uncond_output")
    e = m if u is None else u.double() + 2.5 * (m - u.double())
    clean = (row.x0_sample * x + row.x0_model * e).clamp(-row.clip, row.clip)
    want = row.keep[0] * x + row.keep[1] * e + row.keep[2] * clean
    torch.testing.assert_close(got.kept.double(), want, rtol=2e-6, atol=4e-6)
    assert got.input is None
    assert torch.equal(got.sample, solver_step(*arguments, **options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["two terms", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_network_input_and_bytes(isa, shape, name, dtype):
    row = ROWS[name]._replace(next_input=0.375)
    arguments, options = inputs(shape, row)
    y = solver_step(*arguments, **options)
    got = solver_step(*arguments, **options, emit=("image", "input"), input_dtype=dtype, copies=2)
    assert got.input.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.input, (0.375 * y).to(dtype).repeat(2, 1, 1, 1))
    assert torch.equal(got.image, kr_fast.pack_uint8(y))
    assert got.sample is None


def test_written_into_given_tensors(isa):
    row = KEPT["kept clean"]._replace(next_input=2.0)
    (x, m, _), options = inputs((3, 5, 5), row)
    want = solver_step(x, m, row, **options, emit=("sample", "kept", "input", "image"), input_dtype=torch.float16)
    out = SolverOutput(x, *(torch.empty_like(t) for t in want[1:]))
    assert solver_step(x, m, row, **options, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))  # x among them: written in place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_of_the_network(isa, dtype):
    (x, m, row), options = inputs((3, 5, 5), ROWS["everything"])
    m, u = m.to(dtype), options.pop("uncond_output").to(dtype)
    last = torch.channels_last
    got = solver_step(x, m.contiguous(memory_format=last), row, uncond_output=u, **options)
    assert torch.equal(got, solver_step(x, m.float(), row, uncond_output=u.float(), **options))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("guided", [False, True])
def test_dynamic_thresholding(isa, quantile, guided):
    """Saharia et al., 2022, section 2.3, as diffusers' ``_threshold_sample`` computes it."""
    row = SolverRow(1.3, -0.9, 1.75, 0.1, 0.3, 0.8, quantile=quantile, keep=(0.0, 0.0, 1.0))
    (x, m, _), options = inputs((3, 7, 7), row, guided=guided)
    x = x * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)  # limited below, not at all, above
    got = solver_step(x, m, row, **options, emit=("sample", "kept"))
    u = options.get("uncond_output")
    e = m.double() if u is None else u.double() + 2.5 * (m - u.double())
    clean = 1.3 * x.double() - 0.9 * e
    limit = clean.flatten(1).abs().quantile(quantile, dim=1).clamp(1, 1.75).view(3, 1, 1, 1)
    clean = clean.clamp(-limit, limit) / limit
    torch.testing.assert_close(got.kept.double(), clean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.sample.double(), 0.1 * x + 0.3 * e + 0.8 * clean, rtol=2e-6, atol=4e-6)


finite = st.floats(-2, 2, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(finite, finite, st.floats(0, 3, width=32), *[finite] * 4),
    st.lists(finite, max_size=4),
    st.tuples(st.integers(0, 4), st.integers(1, 40)),
    st.booleans(),
)
def test_any_row(numbers, history, size, guided):
    row = SolverRow(*numbers, 1.0, tuple(history))
    batch, numel = size
    arguments, options = inputs((1, 1, numel), row, batch=batch, guided=guided)
    torch.testing.assert_close(
        solver_step(*arguments, **options).double(), oracle(*arguments, **options), rtol=1e-5, atol=5e-5
    )


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
    (x, m, row), options = inputs((1, 4, 4), ROWS["everything"])
    flat = [*row[:8], 0.5, -0.25, 2.0, *row.history]
    emit = ["sample", "kept", "input", "image"]
    given = (x, m, options["uncond_output"], options["ids"], None, list(options["history"]), flat, 2.5, 9, 4)
    torch.library.opcheck(torch.ops.kr_fast.solver_step, (*given, 2, emit, torch.bfloat16))
    images = torch.empty(3, 4, 4, 1, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.kr_fast.solver_step_out, (*given, 1, torch.empty_like(x), torch.empty_like(x), None, images)
    )
    limits, plain = torch.tensor([1.0, 1.5, 2.0]), [*ROWS["clip"][:8], 0.0, 0.0, 0.0]
    torch.library.opcheck(
        torch.ops.kr_fast.solver_step,
        (x, m, None, None, limits, [], plain, 1.0, 0, 0, 1, ["image"], torch.float32),
    )
    compiled = torch.compile(lambda x, m: solver_step(x, m, row, **options), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, m), solver_step(x, m, row, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_bits_of_cuda_are_those_of_the_cpu(shape, name):
    if not torch.cuda.is_available() or registry.refusal("solver_step", "cuda", Call("cuda", torch.float32)):
        pytest.skip("needs an NVIDIA GPU and kr_fast._cuda")
    (x, m, row), options = inputs(shape, ROWS[name])
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    moved["history"] = tuple(h.cuda() for h in options["history"])
    with registry.forced("cuda"):
        got = solver_step(x.cuda(), m.cuda(), row, **moved).cpu()
    assert torch.equal(got.view(torch.int32), solver_step(x, m, row, **options).view(torch.int32))
