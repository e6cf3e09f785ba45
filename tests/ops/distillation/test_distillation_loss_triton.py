"""The Triton kernels: numbers in Triton's interpreter (a process of its own), and compilation for GPUs without one.

Class counts by regime: 2 smallest tile; 10, 100 several rows a program; 1000 not a power of two; 2048 one whole block;
2049 two blocks; 16,385 blocks of twice that size.
"""

import os

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss

interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def on_both_backends(loss, z, dtype):
    """(value, gradient) of the reference in float64 and of Triton in ``dtype``."""
    found = []
    for backend in ("reference", "triton"):
        leaf = (z.double() if backend == "reference" else z.to(dtype)).requires_grad_()
        with registry.forced(backend):
            value = loss(leaf)
            value.backward(torch.ones_like(value) * 3)
        found.append((value.detach().double(), leaf.grad.double()))
    return found


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_interpreter_edge_cases():
    z = torch.randn(3, 10)
    with registry.forced("triton"):
        assert distillation_loss(z, z.clone()).item() == 0
        assert distillation_loss(torch.randn(0, 10), torch.randn(0, 10)).item() == 0
        t = z.clone()
        t[0, 1] = float("-inf")
        assert torch.isfinite(distillation_loss(z, t))
        ignored = distillation_loss(z, t, torch.full((3,), -100), hard_weight=1.0)
        assert ignored.item() == 0


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_interpreter_lets_nan_through():
    """A maximum drops NaN, so that logits gone wrong would look like a small loss."""
    z, t = torch.randn(3, 10), torch.randn(3, 10)
    z[1, 3] = float("nan")
    with registry.forced("triton"):
        for pair in ((z, t), (t, z)):
            assert distillation_loss(*pair, reduction="none").isnan().tolist() == [False, True, False]


POINTERS = {
    "forward_kernel": ("input", "target", "indices", "labels", "weight", "row_loss", "row_weight", "stats"),
    "backward_kernel": ("upstream", "input", "target", "indices", "labels", "weight", "stats", "scale", "grad"),
}
INTEGERS = {"n": "i32", "input_stride": "i32", "target_stride": "i32", "upstream_stride": "i32", "ignore_index": "i32"}


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize(
    ("classes", "dtype", "topk", "divergence"),
    [
        (10, "fp32", False, 0),
        (100, "fp32", False, 0),
        (1000, "bf16", False, 0),
        (1000, "fp32", False, 0),
        (4096, "bf16", False, 0),
        (128_256, "bf16", False, 0),  # vocabularies are walked in the same blocks, so they must not spill either
        (128_256, "fp32", False, 0),
        (50_257, "bf16", False, 0),  # odd rows
        (128_256, "bf16", False, 2),
        (1000, "bf16", True, 0),
        (1000, "bf16", False, 2),
    ],
)
def test_compiles_for_gpus_without_spills(capability, name, classes, dtype, topk, divergence, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.distillation import distillation_loss as kernels
    from triton_compile import build, spilled_bytes, widest_load

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, block, warps = kernels.tile(classes)
    constants = {
        "C": classes, "ROWS": rows, "BLOCK": block, "ALIGN": kernels.alignment(classes), "HAS_LABELS": True,
        "HAS_WEIGHT": False, "DIVERGENCE": divergence, "SOFT": True, "HARD": True, "weight": None,
    }  # fmt: skip
    constants |= {"KIND": 1, "K": 5, "SMOOTH": True} if topk else {"KIND": 0, "K": 0, "SMOOTH": False, "indices": None}
    function = getattr(kernels, name)
    signature = dict.fromkeys(function.arg_names, "fp32") | dict.fromkeys(POINTERS[name], "*fp32") | INTEGERS
    signature |= {"labels": "*i64", "indices": "*i64"} | dict.fromkeys(("input", "target", "grad"), f"*{dtype}")
    aligned = ("input_stride", "target_stride") if classes % 16 == 0 else ()
    built = build(function, signature, constants, capability=capability, warps=warps, aligned=aligned)
    assert spilled_bytes(built) == 0
    if classes >= 100 and classes % 2 == 0 and not topk and divergence == 0:
        assert widest_load(built) == 16


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reduction_compiles_without_spills(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.distillation import distillation_loss as kernels
    from triton_compile import build, spilled_bytes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = dict.fromkeys(("row_loss", "row_weight", "loss", "scale"), "*fp32") | {"n": "i32"}
    constants = {"MEAN": True, "BLOCK": kernels.REDUCE_BLOCK}
    assert spilled_bytes(build(kernels.reduce_kernel, signature, constants, capability=capability, warps=8)) == 0


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_infinite_upstream_gradient_does_not_reach_a_row_of_weight_0(backend):
    z, t, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.tensor([1.0, 0.0, 2.0])
    with registry.forced(backend):
        rows = distillation_loss(z, t, sample_weight=weight, reduction="none")
        grad = torch.autograd.grad(rows, z, torch.tensor([1.0, float("inf"), 1.0]))[0]
    assert grad[1].abs().max() == 0
    assert torch.isfinite(grad).all()


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rows", [0, 1, 4096, 4097])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_interpreter_reduces_any_number_of_rows(rows, reduction):
    """No row; one; a whole block of the reduction; and one row more."""
    torch.manual_seed(rows)
    z, t, weight = torch.randn(rows, 3), torch.randn(rows, 3), torch.rand(rows)
    found = on_both_backends(
        lambda z: distillation_loss(z, t, sample_weight=weight, reduction=reduction), z, torch.float32
    )
    torch.testing.assert_close(found[1], found[0], rtol=3e-6, atol=1e-6)
