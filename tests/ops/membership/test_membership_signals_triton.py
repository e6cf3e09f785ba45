"""The Triton kernel of membership_signals: numbers in the interpreter, compilation without a GPU.

Class counts by regime: 2 smallest tile; 10, 100 several rows a program; 1000 not a power of two; 2048 one whole block,
read once; 2049, 5000 two and three blocks.
"""

import math
import os

import pytest
import torch

from kr_fast.backends import registry
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1"),
]


def compare(logits, labels, want=SIGNALS):
    with registry.forced("reference"):
        wanted = membership_signals(logits.double(), labels, want)
    with registry.forced("triton"):
        found = membership_signals(logits, labels, want)
    for name in want:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=4e-6, atol=4e-6, msg=lambda text, name=name: f"{name} {text}"
        )


class TestInInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("classes", [2, 10, 100, 1000, 2048, 2049, 5000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_agrees_with_reference(self, classes, dtype):
        torch.manual_seed(classes)
        logits, labels = (4 * torch.randn(7, classes)).to(dtype), torch.randint(0, classes, (7,))
        labels[:4] = logits[:4].float().argmax(1)
        logits[5, -1] = 30.0  # a top in the last block
        compare(logits, labels)

    @pytest.mark.parametrize("classes", [3, 140, 5000])
    def test_classes_that_are_ruled_out_and_equal_ones(self, classes):
        inf, last = math.inf, classes - 1
        logits = torch.full((6, classes), -inf)
        logits[:3, :3] = torch.tensor([[2.0, -inf, -inf], [-inf, 1.0, 0.0], [1.0, 0.5, -inf]])
        logits[3:] = 0.0
        logits[3, [1, last]] = 4.0
        logits[4, last], logits[5, last] = 80.0, -80.0
        labels = torch.tensor([0, 0, 0, last, last, last])
        compare(logits, labels)
        with registry.forced("triton"):
            found = membership_signals(logits, labels, ("phi", "correct"))
        assert found["phi"][:3].tolist() == [inf, -inf, 0.5]
        assert found["correct"].tolist() == [1, 0, 1, 0, 1, 0]

    def test_strides_parts_and_no_rows(self):
        wide, labels = torch.randn(5, 40), torch.arange(5)
        before = wide.clone()
        compare(wide[:, 3:13], labels)
        compare(wide[:, :10].T.contiguous().T, labels)
        assert torch.equal(wide, before)
        for name in SIGNALS:
            compare(wide[:, :10], labels, (name,))
        with registry.forced("triton"):
            assert membership_signals(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))["phi"].shape == (0,)


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(10, "fp32"), (100, "fp32"), (1000, "fp32"), (1000, "bf16"), (2048, "bf16"), (128_256, "bf16")],
)
def test_compiles_for_gpus_without_spills(capability, classes, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.membership import membership_signals as kernels
    from triton_compile import build, spilled_bytes, widest_load

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, block, warps = kernels.tile(classes)
    signature = {"logits": f"*{dtype}", "labels": "*i64", "n": "i32", "stride": "i32"}
    signature |= dict.fromkeys(SIGNALS, "*fp32")
    wanted = dict.fromkeys(("PHI", "LOSS", "ENTROPY", "MODIFIED", "CONFIDENCE", "CORRECT"), True)
    constants = {"C": classes, "ROWS": rows, "BLOCK": block, "ALIGN": kernels.alignment(classes), **wanted}
    aligned = ("stride",) if classes % 16 == 0 else ()
    built = build(kernels.signals_kernel, signature, constants, capability=capability, warps=warps, aligned=aligned)
    assert spilled_bytes(built) == 0
    if classes >= 100:
        assert widest_load(built) == 16
