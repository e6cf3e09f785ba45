"""The layers: imports go downward and in no circle, an op has one name in every place, nothing heavy is early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "cli": 6,
    "benchmarks": 5,
    "recycling": 4,
    "synthesis": 3,
    "ensemble": 3,
    "membership": 3,
    "privacy": 3,
    "training": 2.5,  # the step of a training loop: made of ops, and used by synthesis, ensemble and recycling alike
    "metrics": 2.5,  # of logits and features: ensemble chooses by them, recycling reports them
    "ops": 2,
    "data": 2,
    "models": 2,
    "report": 2,
    "backends": 1,
    "runtime": 1,
    "kernels": 0,
}
ALLOWED_SIDEWAYS = {("membership", "ensemble")}
FAMILIES = ("distillation", "sampling", "nn", "batched", "membership", "privacy")
IN_ONE_KERNEL = {  # with an op that differs in where its coefficients come from, or in what is left of a sum
    "solver_step_at": "solver_step",
    "conv2d_grad_samples": "conv2d_grad_norms",
    "linear_grad_samples": "linear_grad_norms",
    "group_norm_grad_samples": "group_norm_grad_norms",
    "layer_norm_grad_samples": "layer_norm_grad_norms",
}
MOST_FILES = 16  # sources of its own in a folder
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".c", ".sh")
SOURCES = sorted((ROOT / "kr_fast").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if len(p.relative_to(ROOT).parts) > 2], ids=str)
def test_imports_go_downward(path):
    own = path.relative_to(ROOT / "kr_fast").parts[0]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "kr_fast" or len(parts) < 2 or parts[1] not in LAYERS or parts[1] == own:
            assert name != "kr_fast" or own == "cli", f"{path.relative_to(ROOT)} imports the whole package"
            continue
        downward = LAYERS[parts[1]] < LAYERS[own] or (own, parts[1]) in ALLOWED_SIDEWAYS
        assert downward, f"{path.relative_to(ROOT)} imports {name}"


def test_imports_run_in_no_circle():
    edges = {name: imported(path) & MODULES.keys() - {name} for name, path in MODULES.items() if name != "kr_fast"}
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(edges.get(name, ())):
                follow(other, (*way, name))
            done.add(name)

    for name in edges:
        follow(name, ())


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=str)
def test_kernels_import_torch_triton_and_each_other_only(path):
    for name in imported(path):
        assert name.split(".")[0] in ("torch", "triton") or name.startswith("kr_fast.kernels"), name


def test_cplusplus_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            assert "#include <torch" not in path.read_text(), path
            assert "#include <ATen" not in path.read_text(), path
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_files_and_folders_stay_small():
    for top in ("kr_fast", "kernels", "csrc", "tests", "bench"):
        for folder in (ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())):
            files = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name != "__init__.py"]
            assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} files"
            for path in files:
                assert len(path.read_text().splitlines()) <= 400, path


LIGHT = """
import sys, torch
before = set(sys.modules)
import kr_fast, kr_fast.cli, kr_fast.recycling.config, kr_fast.training
kr_fast.distillation_loss
print({"diffusers", "accelerate", "triton", "matplotlib", "jinja2"} & (set(sys.modules) - before))
optimizer = kr_fast.training.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
optimizer.zero_grad()
optimizer.param_groups[0]["params"][0].sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_import_loads_nothing_heavy():
    """Neither does a training step, whose optimizer torch would import its compiler for."""
    # torch itself may import triton; only what we add counts.
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["set()", "False", ""]


def test_every_op_has_its_name_in_every_place():
    """Whoever knows one place of an op finds the others: all lie in the folder of its family."""
    import kr_fast.ops  # noqa: F401  (registers the references)
    from kr_fast.backends import registry

    kernels = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "triton": "kernels/{}.py"}
    always = ("kr_fast/ops/{}.py", "tests/ops/*/test_{op}.py", "bench/*/bench_{op}.py")
    for op in registry.ops():
        family = next(path.parent.name for path in (ROOT / "kr_fast" / "ops").glob(f"*/{op}.py"))
        assert family in FAMILIES
        paths = [place.replace("*", family).format(f"{family}/{op}", op=op) for place in always]
        kernel = f"{family}/{IN_ONE_KERNEL.get(op, op)}"
        paths += [place.format(kernel) for backend, place in kernels.items() if registry.has(op, backend)]
        assert [path for path in paths if not (ROOT / path).exists()] == []


# (file, name) of private names of the package that a test still sets or imports. No line may be added.
PRIVATE_NAMES_STILL_USED: set[tuple[str, str]] = set()


def private_names_used(text: str) -> set[str]:
    """Private names that a test sets (by assignment, monkeypatch or mock) or imports from the package.

    ``self._x`` is the test's own, and the compiled modules ``_cpu`` and ``_cuda`` have no public name.
    """
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kr_fast":
            names |= set(node.module.split(".")) | {alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            names |= {
                target.attr
                for target in targets
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") not in ("self", "cls")
            }
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("setattr", "delattr", "patch", "object", "setitem"):
                texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
                names |= {part for text in texts if isinstance(text, str) for part in text.split(".")}
                names |= {each.attr for each in node.args[:1] if isinstance(each, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - {"_cpu", "_cuda"}


def test_no_test_sets_or_imports_private_names():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "golden.py"]
    found = {(str(path.relative_to(ROOT)), name) for path in tests for name in private_names_used(path.read_text())}
    assert found == PRIVATE_NAMES_STILL_USED


@pytest.mark.parametrize(
    "line",
    [
        "from kr_fast.backends.registry import _x",
        "from kr_fast.ops._x import name",
        "registry._x = {}",
        "monkeypatch.setattr(registry, '_x', {})",
        "monkeypatch.setattr('kr_fast.backends.registry._x', {})",
        "monkeypatch.setitem(registry._x, 'key', None)",
        "mock.patch.object(registry, '_x')",
    ],
)
def test_private_names_are_seen(line):
    assert private_names_used(line) == {"_x"}
