"""The Triton kernel of solver_step: the CPU's bits in the interpreter, and what it compiles to without a GPU.

Shapes: 1x1x1: less than a counter of four; 3x5x5 = 75: rows of no whole counters; 2x4x4: several images a program;
3x32x32: several programs an image.
"""

import os

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 1, 1), (3, 5, 5), (2, 4, 4), (3, 32, 32)]
EVERYTHING = SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 0.375, (0.5, -0.25, 0.125, -1.5), keep=(0.25, -1.5, 2.0))
ROWS = {
    "two terms": SolverRow(sample=1.02, model=-0.13),
    "clip": SolverRow(1.3, -0.9, 1.0, 0.1, 0.3, 0.8),
    "no clip": SolverRow(1.3, -0.9, float("inf"), 0.1, 0.3, 0.8),
    "thresholding": SolverRow(1.3, -0.9, 1.75, 0.1, 0.3, 0.8, quantile=0.9),
    "noise": SolverRow(sample=0.9, model=-0.2, noise=0.4),
    "history": SolverRow(sample=0.9, model=1.5, history=(-0.75,), keep=(0.25, -1.5, 0.0)),
    "kept clean alone": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, keep=(0.0, 0.0, 1.0)),
    "everything": EVERYTHING,
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def inputs(shape, row, guided=False, batch=3):
    draw = torch.Generator().manual_seed(sum(shape))
    x, m, u, *history = (torch.randn(batch, *shape, generator=draw) for _ in range(3 + len(row.history)))
    options = {"ids": torch.arange(batch) * (2**32 + 7), "seed": 2**40 + 9, "stream": 4, "history": tuple(history)}
    options |= {"uncond_output": u, "guidance_scale": 2.5} if guided else {}
    return x, m, options


def on_both(x, m, row, **options):
    wanted = solver_step(x, m, row, **options)
    with registry.forced("triton"):
        return solver_step(x, m, row, **options), wanted


interpreter = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")]


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", ROWS)
    @pytest.mark.parametrize("guided", [False, True])
    def test_bits_of_the_cpu(self, shape, name, guided):
        row = ROWS[name]
        x, m, options = inputs(shape, row, guided)
        before = [t.clone() for t in (x, m, *options["history"])]
        emit = ("sample", "kept", "image") if row.keep else ("sample", "image")
        got, wanted = on_both(x, m, row, **options, emit=emit)
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True) if b is not None)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, m, *options["history"]), strict=True))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("copies", [1, 2])
    def test_network_input(self, shape, dtype, copies):
        x, m, options = inputs(shape, EVERYTHING)
        emit = ("input", "image")
        got, wanted = on_both(x, m, EVERYTHING, **options, emit=emit, input_dtype=dtype, copies=copies)
        assert same(got.input, wanted.input)
        assert same(got.image, wanted.image)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_outputs_of_the_network(self, shape, dtype, layout):
        x, m, options = inputs(shape, EVERYTHING, guided=True)
        options["uncond_output"] = options["uncond_output"].to(dtype)
        got, wanted = on_both(x, m.to(dtype).contiguous(memory_format=layout), EVERYTHING, **options)
        assert same(got, wanted)

    def test_bf16_rounds_to_even_and_keeps_nan_and_inf(self):
        ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], dtype=torch.int32)
        x = ties.view(torch.float32).view(1, 1, 1, -1)
        x = torch.cat([x, -x], dim=3)
        row = SolverRow(sample=1.0)
        got, wanted = on_both(x, torch.zeros_like(x), row, emit=("input",), input_dtype=torch.bfloat16)
        torch.testing.assert_close(got.input, wanted.input, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got.input, x.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_written_in_place(self):
        x, m, options = inputs((3, 5, 5), EVERYTHING)
        wanted = solver_step(x, m, EVERYTHING, **options, emit=("sample", "kept"))
        out = SolverOutput(x, torch.empty_like(x))
        with registry.forced("triton"):
            solver_step(x, m, EVERYTHING, **options, out=out)
        assert same(out.sample, wanted.sample)
        assert same(out.kept, wanted.kept)

    @pytest.mark.parametrize("batch", [0, 1, 300])
    def test_any_number_of_images_of_any_rank(self, batch):
        x, m, options = inputs((6,), ROWS["noise"], batch=batch)
        assert same(*on_both(x, m, ROWS["noise"], **options))


POINTERS = dict.fromkeys(("x", "limits", "h0", "h1", "h2", "h3", "y", "kept"), "*fp32") | {"ids": "*i64"}
WORDS = dict.fromkeys(("batch", "numel", "pixels", "blocks"), "i32") | dict.fromkeys(("seed", "stream"), "i64")


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "last", "dtype", "absent"),
    [
        ("clip", False, "fp32", "uncond ids limits h0 h1 h2 h3 kept input image"),
        ("guided clip, bf16 network", True, "bf16", "ids limits h0 h1 h2 h3 kept image"),
        ("everything", True, "fp16", ""),
    ],
)
def test_compiles_to_exactly_rounded_arithmetic(capability, name, last, dtype, absent, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.sampling import philox_normal, solver_step
    from triton_compile import build, inexact_instructions, spilled_bytes, widest_load

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    network = dict.fromkeys(("cond", "uncond", "input"), f"*{dtype}") | {"image": "*u8"}
    signature = dict.fromkeys(solver_step.step.arg_names, "fp32") | POINTERS | network | WORDS
    constants = dict.fromkeys(absent.split()) | philox_normal.tile(256, 3072)
    constants |= {"CHANNELS": 3, "LAST": last, "CLEAN": True, "NOISY": name == "everything", "COPIES": 2}
    built = build(
        solver_step.step, signature, constants, capability=capability, warps=philox_normal.WARPS,
        aligned=("numel", "pixels"), fusion=False,
    )  # fmt: skip
    assert inexact_instructions(built) == set()
    assert spilled_bytes(built) == 0
    assert widest_load(built) == 16
