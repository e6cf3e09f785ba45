"""Codes of backends/codes.py are those of the enums and constants in C++, CUDA and Triton, read from the sources."""

import ast
import re
from pathlib import Path

import pytest
import torch

from kr_fast.backends import codes, native
from kr_fast.ops.sampling.solver_step import MAX_HISTORY

ROOT = Path(__file__).parents[2]
HEADERS = sorted((ROOT / "csrc").rglob("*.h"))
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
pytestmark = pytest.mark.skipif(not HEADERS, reason="needs the source tree")


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def enum(name: str) -> dict[str, int]:
    """Enumerator -> number of the enum class of this name, which one header alone defines."""
    result = [
        match.group(1)
        for path in HEADERS
        for match in re.finditer(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", without_comments(path))
    ]
    assert len(result) == 1, f"{name} is defined in {len(result)} headers"
    numbers: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in result[0].split(","))):
        key, _, number = item.partition("=")
        numbers[key.strip()] = int(number) if number else max(numbers.values(), default=-1) + 1
    return numbers


def constant(name: str) -> float:
    """The value of the C++ constant of this name, which one header alone defines."""
    pattern = rf"constexpr [^;]*\b{name} = ([\d.]+)"
    result = [match.group(1) for path in HEADERS for match in re.finditer(pattern, without_comments(path))]
    assert len(result) == 1, f"{name} is defined in {len(result)} headers"
    return float(result[0])


def in_kernel(path: str, name: str):
    """The value of the constant ``name`` of a module of kernels/, which need not be importable here."""
    for node in ast.parse((ROOT / "kernels" / path).read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            return ast.literal_eval(node.value)
    raise AssertionError(f"kernels/{path} defines no {name}")


def numbered(names) -> dict[str, int]:
    return {name or "none": number for number, name in enumerate(names)}


def test_enums():
    assert enum("Dtype") == {NAMES[dtype]: code for dtype, code in codes.DTYPES.items()}
    assert enum("Divergence") == codes.DIVERGENCES
    assert enum("Variance") == numbered(codes.VARIANCES)
    assert enum("Predicate") == numbered(codes.PREDICATES)
    assert enum("Activation") == numbered(codes.ACTIVATIONS)


def test_kinds_of_target():
    """Rows of the top k become probabilities."""
    assert enum("TargetKind") | {"topk_smooth": 1, "topk_renorm": 1} == codes.TARGET_KINDS


def test_codes_of_the_triton_loss():
    for name in ("TARGET_KINDS", "DIVERGENCES", "LOSS_STATISTICS"):
        assert in_kernel("distillation/distillation_loss.py", name) == getattr(codes, name)


def test_signals_are_in_the_order_of_the_outputs():
    header = (ROOT / "csrc" / "common" / "membership" / "membership_signals.h").read_text()
    (fields,) = re.findall(r"struct SignalOutputs {\s*float ([^;]*);", header)
    assert tuple(field.strip(" *") for field in fields.split(",")) == codes.SIGNALS


def test_constants():
    assert constant("kDistillationStats") == codes.LOSS_STATISTICS
    assert constant("kLiraPrior") == codes.LIRA_PRIOR
    assert constant("kSolverHistory") == MAX_HISTORY


@pytest.mark.skipif(native.cpu is None, reason="needs kr_fast._cpu")
def test_instruction_sets():
    assert set(native.cpu.isa_available()) <= enum("Isa").keys()
