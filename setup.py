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
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent
CPU_FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
CPU_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 warns inside its own AVX-512 header
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Real machine code for the two generations in wide use, PTX for what comes after them.
DEFAULT_ARCHS = ["8.0", "9.0+PTX"]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).rglob(f"*{suffix}"))


def chosen(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"setup.py: {name} must be 0 or 1, got {value!r}")
    return value == "1"


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
    for alone in ("KR_FAST_NO_EXT", "KR_FAST_SANITIZE"):  # nothing compiled; kr_fast._cpu alone
        if chosen(alone) and mode == "1":
            raise SystemExit(f"setup.py: {alone}=1 builds no CUDA kernels, got KR_FAST_CUDA=1 too")
        mode = "0" if chosen(alone) else mode
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


def architectures() -> list[str]:
    """Of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX" or space separated), or the default."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or DEFAULT_ARCHS
    for item in listed:
        if re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", item) is None:
            raise SystemExit(f"setup.py: TORCH_CUDA_ARCH_LIST must hold items like 8.0 or 9.0+PTX, got {item!r}")
    return listed


def gencode_flags() -> list[str]:
    flags = []
    for item in ARCHS:
        arch = item.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if item.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class BuildExt(build_ext):
    """Compiles ``csrc/cuda`` with nvcc, then links the objects into the pybind11 module like any other."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except (CompileError, PlatformError) as error:
            raise SystemExit(
                f"setup.py: compiling failed: {error}. It needs a C++17 compiler (apt install g++, or CXX=...); "
                "KR_FAST_NO_EXT=1 installs the slow reference kernels alone"
            ) from None

    def build_extension(self, ext):
        if ext.name == "kr_fast._cuda":
            ext.extra_objects = self.compile_cuda(Path(self.build_temp))
        super().build_extension(ext)

    def compile_cuda(self, out: Path) -> list[str]:
        out.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(out / (Path(source).stem + ".cuda.o"))
            command = [NVCC, "-c", source, "-o", target, "-O3", "-std=c++17", "-Icsrc", "-lineinfo", *gencode_flags()]
            if subprocess.run(
                [*command, "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]
            ).returncode:
                raise SystemExit(f"setup.py: nvcc failed on {source}, see above; KR_FAST_CUDA=0 builds no CUDA kernels")
            return target

        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(compile_one, sources("cuda", ".cu")))


NVCC = find_nvcc()
ARCHS = architectures() if NVCC else []


def extensions() -> list[Pybind11Extension]:
    if chosen("KR_FAST_NO_EXT"):
        return []
    sanitizers = [*SANITIZERS, "-O1", "-g1"] if chosen("KR_FAST_SANITIZE") else []
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
    common = {"include_dirs": ["csrc"], "cxx_std": 17, "depends": headers}
    found = [
        Pybind11Extension(
            "kr_fast._cpu",
            ["csrc/bindings_cpu.cpp", *sources("cpu", ".cpp")],
            # The user's flags come last, so that they can change ours.
            extra_compile_args=[*CPU_FLAGS, *sanitizers, *os.environ.get("CXXFLAGS", "").split()],
            extra_link_args=["-fopenmp", *sanitizers],
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
                define_macros=[("KR_CUDA_ARCHITECTURES", f'"{" ".join(ARCHS)}"')],
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
    include_package_data=False,  # but for these
    package_data={"kr_fast": ["py.typed", "*.pyi"], "kr_fast.report": ["templates/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
