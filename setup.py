"""Build of the compiled modules ``kr_fast._cpu`` and, where nvcc is found, ``kr_fast._cuda``.

Neither module sees a torch header: they take raw addresses. So the build needs pybind11 and a compiler only, works
under build isolation, and one wheel serves every torch. The environment variables read here are listed in
``docs/start/install.md``.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
CPU_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 warns inside its own AVX-512 header
CPU_FLAGS += os.environ.get("CXXFLAGS", "").split()  # after ours, which they may change
# Real machine code for the two generations in wide use, PTX for what comes after them.
DEFAULT_ARCHS = ["8.0", "9.0+PTX"]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).rglob(f"*{suffix}"))


def jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdigit() and int(value) > 0):
        raise SystemExit(f"setup.py: MAX_JOBS must be a positive integer, got {value!r}")
    return int(value) if value else os.cpu_count() or 1


def find_nvcc() -> str | None:
    """nvcc by KR_FAST_CUDA=auto|1|0: from CUDA_HOME, else from PATH."""
    mode = os.environ.get("KR_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: KR_FAST_CUDA must be auto, 1 or 0, got {mode!r}")
    if mode == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if found is None and mode == "1":
        raise SystemExit("setup.py: KR_FAST_CUDA=1 needs nvcc: put it on PATH, or set CUDA_HOME or KR_FAST_CUDA=auto")
    return found


def find_toolkit(nvcc: str) -> Path:
    """The folder with include/cuda_runtime.h; nvcc on PATH may be a wrapper script, so nvcc itself is asked last."""
    toolkit = Path(os.path.realpath(nvcc)).parent.parent
    if not (toolkit / "include" / "cuda_runtime.h").exists():
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        match = re.search(r"TOP=(\S+)", dry)
        toolkit = Path(match.group(1)).resolve() if match else toolkit
    return toolkit


def gencode_flags() -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX" or space separated) or the default."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or DEFAULT_ARCHS
    flags = []
    for item in listed:
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"setup.py: TORCH_CUDA_ARCH_LIST must hold items like 8.0 or 9.0+PTX, got {item!r}")
        arch = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class BuildExt(build_ext):
    """Compiles ``csrc/cuda`` with nvcc, then links the objects into the pybind11 module like any other."""

    def build_extension(self, ext):
        if ext.name == "kr_fast._cuda":
            ext.extra_objects = self.compile_cuda(Path(self.build_temp))
        super().build_extension(ext)

    def compile_cuda(self, out: Path) -> list[str]:
        out.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(out / (Path(source).stem + ".cuda.o"))
            subprocess.run(
                [NVCC, "-c", source, "-o", target, "-O3", "-std=c++17", "-Icsrc", "-lineinfo"]
                + ["-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", *GENCODE],
                check=True,
            )
            return target

        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(compile_one, sources("cuda", ".cu")))


NVCC = find_nvcc()
GENCODE = gencode_flags() if NVCC else []


def extensions() -> list[Pybind11Extension]:
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
    common = {"include_dirs": ["csrc"], "cxx_std": 17, "depends": headers}
    found = [
        Pybind11Extension(
            "kr_fast._cpu",
            ["csrc/bindings_cpu.cpp", *sources("cpu", ".cpp")],
            extra_compile_args=CPU_FLAGS,
            extra_link_args=["-fopenmp"],
            **common,
        )
    ]
    if NVCC:
        toolkit = find_toolkit(NVCC)
        found.append(
            Pybind11Extension(
                "kr_fast._cuda",
                ["csrc/bindings_cuda.cpp"],
                # cudart is linked statically, so that the module also loads on a machine without a driver.
                library_dirs=[str(toolkit / name) for name in ("lib64", "lib") if (toolkit / name).exists()],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                **{**common, "include_dirs": ["csrc", str(toolkit / "include")]},
            )
        )
        found[-1].depends += sources("cuda", ".cu")
    return found


def packages(folder: str, name: str) -> list[str]:
    """``name`` and the packages in it, from the folder that holds it."""
    found = sorted(path.parent.relative_to(ROOT / folder).parts for path in (ROOT / folder).rglob("__init__.py"))
    return [".".join((name, *parts)) for parts in found]


ParallelCompile(default=jobs()).install()
setup(
    packages=packages("kr_fast", "kr_fast") + packages("kernels", "kr_fast.kernels"),
    package_dir={"kr_fast": "kr_fast", "kr_fast.kernels": "kernels"},
    package_data={"kr_fast.report": ["templates/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
