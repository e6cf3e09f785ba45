"""What pip-installs: sdist, then a wheel under build isolation, then the package in an environment of its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = list((ROOT / "kr_fast" / "report" / "templates").iterdir())
OUTSIDE = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "KR_FAST", "TRITON"))}


def run(*command, cwd, check=True, **env):
    """A command without what this process's environment would lend it."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**OUTSIDE, **env}
    )
    assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of what git tracks, so that nothing built here slips in."""
    keep = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "runs")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "kr_fast", ignore=keep)


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=source)
    (result,) = out.glob("*.tar.gz")
    return result


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist by pip under build isolation: no torch in sight. Not optimised and for one GPU generation,
    which takes a third of the time: the environment of these tests was installed from the same sources with all."""
    out, command = tmp_path_factory.mktemp("wheel"), [sys.executable, "-m", "pip", "wheel", "--no-deps"]
    quick = {"TORCH_CUDA_ARCH_LIST": "8.0", "CXXFLAGS": "-O0", "NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0"}
    run(*command, "--wheel-dir", out, sdist, cwd=out, **quick)
    (result,) = out.glob("*.whl")
    return result


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """(python, empty folder): the wheel alone in a clean environment; torch and the like by a path file."""
    home, elsewhere = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=elsewhere)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).stdout.strip()
    # A plain path file adds the folder, but not the editable install of kr_fast that may lie in it.
    (Path(packages) / "heavy.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    return python, elsewhere


def test_sdist_holds_all_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "kr_fast"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".html", ".css"):
                assert str(path.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("tests/")]


def test_wheel_holds_the_package_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(name.startswith("kr_fast/_cpu.") and name.endswith(".so") for name in names)
    assert any(name.startswith("kr_fast/_cuda.") for name in names) == (shutil.which("nvcc") is not None)
    assert "kr_fast/kernels/distillation/distillation_loss.py" in names
    assert {"kr_fast/py.typed", *(f"kr_fast/report/templates/{path.name}" for path in TEMPLATES)} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kr_fast"}
    assert wheel.stat().st_size < 20e6


def test_installed_package_works_from_another_folder(installed):
    python, elsewhere = installed
    code = """
import kr_fast, torch
from pathlib import Path
import sys
assert Path(kr_fast.__file__).is_relative_to(sys.prefix), kr_fast.__file__
x, t, y = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10), torch.randint(0, 10, (64,))
loss = kr_fast.distillation_loss(x, t, y, temperature=4.0, soft_weight=1.0, hard_weight=0.1)
loss.backward()
expected = 16 * torch.nn.functional.kl_div((x / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
expected = expected + 0.1 * torch.nn.functional.cross_entropy(x, y)
torch.testing.assert_close(loss, expected)
noise = kr_fast.philox_normal(torch.arange(4), (3, 8, 8), seed=1)
assert noise.shape == (4, 3, 8, 8) and kr_fast.pack_uint8(noise).shape == (4, 8, 8, 3)
print("works")
"""
    assert run(python, "-c", code, cwd=elsewhere).stdout.strip() == "works"
    assert "distillation_loss" in run(python.parent / "kr-fast", "info", cwd=elsewhere).stdout


def test_installed_command_runs_the_pipeline(installed):
    python, elsewhere = installed
    flags = ["--preset", "toy", "--out", "here", "--num-shadows", "0"]
    done = run(python.parent / "kr-fast", "run", *flags, cwd=elsewhere, KR_FAST_PROGRESS="0")
    assert done.stdout.strip().endswith("report: here/release/report.html")
    assert (elsewhere / "here" / "release" / "report.html").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"KR_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "setup.py: KR_FAST_CUDA=1 needs nvcc"),
        ({"KR_FAST_CUDA": "maybe"}, "setup.py: KR_FAST_CUDA must be auto, 1 or 0, got 'maybe'"),
        ({"KR_FAST_CUDA": "0", "MAX_JOBS": "many"}, "setup.py: MAX_JOBS must be a positive integer, got 'many'"),
        ({"KR_FAST_NO_EXT": "yes"}, "setup.py: KR_FAST_NO_EXT must be 0 or 1, got 'yes'"),
        ({"KR_FAST_NO_EXT": "1", "KR_FAST_CUDA": "1"}, "setup.py: KR_FAST_NO_EXT=1 builds no CUDA kernels, got KR_F"),
        ({"KR_FAST_SANITIZE": "1", "KR_FAST_CUDA": "1"}, "setup.py: KR_FAST_SANITIZE=1 builds no CUDA kernels, got"),
    ],
)
def test_build_refuses_bad_settings(variables, words, tmp_path):
    done = run(sys.executable, ROOT / "setup.py", "--version", cwd=ROOT, check=False, **variables)
    assert done.returncode != 0
    assert done.stderr.strip() == words or done.stderr.strip().startswith(words)


def test_without_extensions_every_op_is_its_reference(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path]
    run(*command, cwd=source, KR_FAST_NO_EXT="1")
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import kr_fast, torch
for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8).half()):
    assert kr_fast.pack_uint8(x).shape == (1, 8, 8, 3)
noise = kr_fast.philox_normal(torch.arange(4), (3, 8, 8), seed=1)
print(kr_fast.__file__)
"""
    # -S: no path files, so that the editable install of this environment does not lend its modules.
    heavy = str(Path(numpy.__file__).parents[1])
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path / "site", PYTHONPATH=heavy)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site")
    (line,) = done.stderr.splitlines()
    assert "every op runs on the slow reference backend: cpu: kr_fast._cpu was not built" in line


def test_a_failed_compilation_names_the_way_out(tmp_path):
    command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = run(*command, "--force", cwd=ROOT, check=False, KR_FAST_CUDA="0", CXX="/nowhere/g++", CC="/nowhere/gcc")
    assert done.returncode != 0
    assert "KR_FAST_NO_EXT=1 installs the slow reference kernels alone" in done.stderr


def test_build_refuses_unknown_architectures(nvcc, tmp_path):
    command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = run(*command, "--force", cwd=ROOT, check=False, TORCH_CUDA_ARCH_LIST="Hopper", KR_FAST_CUDA="1")
    assert done.returncode != 0
    assert "setup.py: TORCH_CUDA_ARCH_LIST must hold items like 8.0 or 9.0+PTX, got 'Hopper'" in done.stderr
