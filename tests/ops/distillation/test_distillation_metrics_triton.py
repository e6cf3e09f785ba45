"""The Triton kernel of distillation_metrics: numbers in the interpreter, compilation without a GPU.

Class counts by regime: 2 smallest tile; 10, 100 several rows a program; 1000 not a power of two; 2048 one whole block,
read once; 2049, 5000 two and three blocks, whose sums move with the row max.
"""

import math
import os

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1"),
]


def compare(z, t, y, **options):
    with registry.forced("reference"):
        wanted = distillation_metrics(z.double(), t.double(), y, **options)
    with registry.forced("triton"):
        found = distillation_metrics(z, t, y, **options)
    for name, ours in found._asdict().items():
        theirs = getattr(wanted, name)
        if theirs is None or theirs.dtype == torch.bool:
            assert ours is theirs if theirs is None else torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=3e-6, msg=lambda text, name=name: f"{name} {text}")


class TestInInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("classes", [2, 10, 100, 1000, 2048, 2049, 5000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_agrees_with_reference(self, classes, dtype):
        torch.manual_seed(classes)
        t = torch.randn(7, classes).mul(3).to(dtype)
        z, y = (t + torch.randn(7, classes)).to(dtype), torch.randint(0, classes, (7,))
        y[:3] = t[:3].float().argmax(1)
        y[4] = -100
        z[5, -1] = t[6, -1] = 20.0  # a max in the last block
        compare(z, t, y, temperature=4.0)
        compare(z, t, None, temperature=1.0)

    @pytest.mark.parametrize("classes", [10, 5000])
    def test_ties_and_classes_that_are_ruled_out(self, classes):
        z, t = torch.zeros(5, classes), torch.zeros(5, classes)
        z[:, [3, classes - 1]] = 1
        t[:, classes - 1] = 1
        z[0, 0] = t[0, 0] = -math.inf  # by both
        t[1, 1] = -math.inf  # by the teacher: costs q only
        z[2, 2] = -math.inf  # by the student alone: infinite
        t[3, 1:] = -math.inf  # the teacher is sure
        t[4, : classes - 2] = z[4, : classes - 2] = -math.inf  # nothing before the last block
        compare(z, t, torch.tensor([3, 3, classes - 1, 0, classes - 1]))
        with registry.forced("triton"):
            found = distillation_metrics(z, t)
        assert found.agreement.tolist() == [False, False, False, False, True]
        assert found.kl[2] == math.inf
        assert found.teacher_entropy[3] == 0

    def test_strides_mixed_dtypes_no_rows_and_inputs_unchanged(self):
        wide = torch.randn(5, 40)
        z, t = wide[:, 3:13], torch.randn(10, 5).T.to(torch.bfloat16)
        before = wide.clone()
        compare(z, t, torch.arange(5))
        assert torch.equal(wide, before)
        with registry.forced("triton"):
            assert distillation_metrics(torch.zeros(0, 3), torch.zeros(0, 3)).kl.shape == (0,)


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(10, "fp32"), (100, "fp32"), (1000, "fp32"), (1000, "bf16"), (2048, "bf16"), (4096, "bf16"), (128_256, "bf16")],
)
def test_compiles_for_gpus_without_spills(capability, classes, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.distillation import distillation_metrics as kernels
    from triton_compile import build, spilled_bytes, widest_load

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, block, warps = kernels.tile(classes)
    signature = {"input": f"*{dtype}", "target": f"*{dtype}", "labels": "*i64", "temperature": "fp32", "n": "i32"}
    signature |= dict.fromkeys(("kl", "teacher_confidence", "teacher_entropy", "cross_entropy"), "*fp32")
    signature |= dict.fromkeys(("agreement", "student_correct", "teacher_correct"), "*i1")
    signature |= dict.fromkeys(("input_stride", "target_stride"), "i32")
    constants = {"C": classes, "ROWS": rows, "BLOCK": block, "HAS_LABELS": True, "ALIGN": kernels.alignment(classes)}
    aligned = ("input_stride", "target_stride") if classes % 16 == 0 else ()
    built = build(kernels.metrics_kernel, signature, constants, capability=capability, warps=warps, aligned=aligned)
    assert spilled_bytes(built) == 0
    if classes >= 100:
        assert widest_load(built) == 16
