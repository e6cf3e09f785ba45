"""The house: imports go downward only, the build knows no torch, and nothing heavy is imported early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "cli": 5,
    "recycling": 4,
    "synthesis": 3,
    "ensemble": 3,
    "membership": 3,
    "ops": 2,
    "data": 2,
    "models": 2,
    "report": 2,
    "backends": 1,
    "runtime": 1,
    "kernels": 0,
}
ALLOWED_SIDEWAYS = {("membership", "ensemble")}
SOURCES = sorted((ROOT / "kr_fast").rglob("*.py"))


def imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if len(p.relative_to(ROOT).parts) > 2], ids=str)
def test_imports_go_downward(path):
    own = path.relative_to(ROOT / "kr_fast").parts[0]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "kr_fast" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == own:
            continue
        downward = FLOORS[parts[1]] < FLOORS[own] or (own, parts[1]) in ALLOWED_SIDEWAYS
        assert downward, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=str)
def test_kernels_import_torch_triton_and_each_other_only(path):
    for name in imported(path):
        assert name.split(".")[0] in ("torch", "triton") or name.startswith("kr_fast.kernels"), name


def test_cplusplus_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            assert "#include <torch" not in path.read_text(), path
            assert "#include <ATen" not in path.read_text(), path
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_files_stay_short():
    for folder in ("kr_fast", "kernels", "csrc", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                assert len(path.read_text().splitlines()) <= 400, path


def test_import_loads_nothing_heavy():
    code = (
        "import sys, kr_fast, kr_fast.cli; kr_fast.distillation_loss; "
        "print([m for m in ('diffusers', 'accelerate', 'triton', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch itself may import triton; only what we add counts.
    base = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = "['triton']" if base.stdout.strip() == "True" else "[]"
    assert done.stdout.strip() == expected


def test_every_op_has_its_stem_in_every_place():
    """Whoever knows one place of an op finds the others."""
    from kr_fast.backends import registry

    for op in registry.ops():
        assert (ROOT / "kr_fast" / "ops" / f"{op}.py").exists(), op
        if registry.refusal(op, "cpu", "cpu", __import__("torch").float32) is None or op == "roc":
            assert (ROOT / "csrc" / "cpu" / f"{op}.cpp").exists(), op
        assert list((ROOT / "tests" / "ops").glob(f"test_{op}*.py")), op
