"""What the CUDA solver step takes and emits, its source run on the CPU: the bits of the CPU kernel.

Shapes: 1x1x1: less than a thread's four elements; 3x5x5 = 75: rows that are not 16-byte aligned; 2x4x4: 16-byte rows;
3x20x20: several blocks.
"""

import pytest
import torch
from cuda_on_host import in_use, machine, same_bits

from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step

SHAPES = [(1, 1, 1), (3, 5, 5), (2, 4, 4), (3, 20, 20)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMIT = ("sample", "kept", "input", "image")
EVERYTHING = SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 0.375, (0.5, -0.25, 0.125, -1.5), keep=(0.25, -1.5, 2.0))
ROWS = {
    "kept": SolverRow(sample=0.9, model=1.5, keep=(0.25, -1.5, 0.0)),
    "kept and history": SolverRow(sample=0.9, model=1.5, history=(-0.75,), keep=(0.25, -1.5, 0.0)),
    "kept clean alone": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, keep=(0.0, 0.0, 1.0)),
    "thresholding": SolverRow(1.3, -0.9, 1.75, 0.1, 0.3, 0.8, quantile=0.9, keep=(0.0, 0.0, 1.0)),
    "everything": EVERYTHING,
}


def inputs(shape, row, guided=True, batch=3):
    draw = torch.Generator().manual_seed(sum(shape))
    x, m, u, *history = (torch.randn(batch, *shape, generator=draw) for _ in range(3 + len(row.history)))
    options = {"ids": torch.arange(batch) * (2**32 + 7), "seed": 2**40 + 9, "stream": 4, "history": tuple(history)}
    options |= {"uncond_output": u, "guidance_scale": 2.5} if guided else {}
    return x, m, options


def bits(a, b):
    """Equal bits and strides, whatever the layout."""
    return a.stride() == b.stride() and same_bits(a.contiguous().view(-1), b.contiguous().view(-1))


def agree(host_cuda, x, m, row, **options):
    wanted = solver_step(x, m, row, **options)
    with in_use(host_cuda):
        got = solver_step(x, m, row, **options)
    return all(bits(a, b) for a, b in zip(got, wanted, strict=True) if b is not None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("guided", [False, True])
def test_kept_limits_and_bytes(host_cuda, shape, name, guided):
    x, m, options = inputs(shape, ROWS[name], guided)
    before = [t.clone() for t in (x, m, *options["history"])]
    assert agree(host_cuda, x, m, ROWS[name], **options, emit=("sample", "kept", "image"))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, m, *options["history"]), strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [1, 2])
def test_network_input_in_its_dtype_and_copies(host_cuda, shape, dtype, copies):
    x, m, options = inputs(shape, EVERYTHING)
    assert agree(host_cuda, x, m, EVERYTHING, **options, emit=EMIT, input_dtype=dtype, copies=copies)
    assert agree(host_cuda, x, m, EVERYTHING, **options, emit=("input", "image"), input_dtype=dtype, copies=copies)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_of_the_network_in_any_dtype_and_layout(host_cuda, shape, dtype, layout, other):
    x, m, options = inputs(shape, EVERYTHING)
    options["uncond_output"] = options["uncond_output"].to(dtype).contiguous(memory_format=other)
    assert agree(host_cuda, x, m.to(dtype).contiguous(memory_format=layout), EVERYTHING, **options, emit=EMIT)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_reads_and_writes_every_kind_of_number(host_cuda, dtype):
    """Every finite 16-bit number on the way in; ties, overflow, subnormals and signed zeros on the way out."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    m = every[: len(every) // 64 * 64].view(1, 1, 64, -1)
    x = torch.zeros_like(m, dtype=torch.float32)
    assert agree(host_cuda, x, m, SolverRow(model=1.0), emit=("sample", "input"), input_dtype=dtype)
    bits32 = torch.arange(0, 2**31 - 2**24, 4097 * 13, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits32.view(torch.float32), -bits32.view(torch.float32)]).view(1, 1, 2, -1)
    assert agree(host_cuda, x, torch.zeros_like(x), SolverRow(sample=1.0), emit=("sample", "input"), input_dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_written_in_place(host_cuda, shape):
    x, m, options = inputs(shape, EVERYTHING)
    wanted = solver_step(x, m, EVERYTHING, **options, emit=EMIT, input_dtype=torch.float16)
    out = SolverOutput(x, *(torch.empty_like(t) for t in wanted[1:]))
    with in_use(host_cuda):
        solver_step(x, m, EVERYTHING, **options, out=out)
    assert all(bits(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("which", ["sample", "model_output", "history"])
def test_any_address_may_be_unaligned(host_cuda, which):
    """Rows of whole 16 bytes, and one tensor whose base is not."""
    x, m, options = inputs((2, 4, 4), EVERYTHING)

    def moved(t):
        return torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t)

    if which == "history":
        options["history"] = (*options["history"][:3], moved(options["history"][3]))
    x, m = moved(x) if which == "sample" else x, moved(m) if which == "model_output" else m
    assert agree(host_cuda, x, m, EVERYTHING, **options, emit=EMIT)


@pytest.mark.sanitize
@pytest.mark.parametrize("most_blocks", [1, 3])
def test_grid_strides_and_order_do_not_matter(host_cuda, most_blocks):
    x, m, options = inputs((3, 20, 20), EVERYTHING, batch=5)
    with machine(host_cuda, descending=True, most_blocks=most_blocks):
        assert agree(host_cuda, x, m, EVERYTHING, **options, emit=EMIT, copies=2)
