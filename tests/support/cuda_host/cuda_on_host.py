"""Builds csrc/cuda and its bindings with g++ against the headers beside it, for a machine without a GPU.

Two things are rewritten in a copy of the sources, as they are no C++: a launch ``kernel<<<grid, block>>>(...)``, and
the declaration of dynamic shared memory.
"""

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

from kr_fast.backends import native, registry

ROOT = Path(__file__).parents[3]
HEADERS = Path(__file__).parent
BUILDS = ROOT / "build" / "cuda_on_host"
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-g1"]
SANITIZED = os.environ.get("CUDA_ON_HOST_SANITIZED") == "1"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    return None if (ROOT / "csrc" / "cuda").exists() else "needs the source tree"


def rewritten(text: str) -> str:
    text = re.sub(r"([\w:]+(?:<[^<>;{}]*>)?)\s*<<<(.+?)>>>\(", r"cuda_host::Launch(\2).run(\1, ", text, flags=re.DOTALL)
    dynamic = r"extern __shared__ ([\w ]+?) (\w+)\[\];"
    return re.sub(dynamic, r"\1* \2 = reinterpret_cast<\1*>(cuda_host::dynamic_shared());", text)


def copy_sources(folder: Path) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for path in (folder / "csrc" / "cuda").rglob("*.*"):
        path.write_text(rewritten(path.read_text()))
    return folder / "csrc"


def compile_all(sources: list[tuple[Path, tuple[str, ...]]], include: Path, out: Path) -> None:
    """A library of these sources, each with its flags."""
    system = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]

    def compile_one(source: Path, flags: tuple[str, ...]) -> Path:
        target = out.parent / f"{source.stem}.o"
        run(["g++", "-c", "-x", "c++", *FLAGS, *flags, f"-I{HEADERS}", f"-I{include}", *system, "-o", target, source])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, *zip(*sources, strict=True)))
    sanitizers = SANITIZERS if any(set(SANITIZERS) <= set(flags) for _, flags in sources) else ()
    run(["g++", "-shared", *sanitizers, "-o", out, *objects])


def run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def build() -> Path:
    """``kr_fast._cuda`` for the host, built once for these sources, by whichever process comes first."""
    flags = ("-Og", *SANITIZERS) if SANITIZED else ("-O1", *WARNINGS)
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = BUILDS / _digest(*flags)
        out = folder / "_cuda.so"
        if not out.exists():
            shutil.rmtree(folder, ignore_errors=True)
            csrc = copy_sources(folder)
            kernels = [*sorted((csrc / "cuda").rglob("*.cu")), HEADERS / "control.cpp"]
            # The bindings touch no memory of tensors: to sanitize them only takes time.
            sources = [(csrc / "bindings_cuda.cpp", ("-O0",)), *((kernel, flags) for kernel in kernels)]
            compile_all(sources, csrc, folder / "unfinished.so")
            (folder / "unfinished.so").rename(out)
    return out


def _digest(*flags: str) -> str:
    """Of all that the module is made of."""
    made_of = hashlib.sha256(" ".join((sys.version, pybind11.__version__, *FLAGS, *flags)).encode())
    paths = (path for folder in (ROOT / "csrc", HEADERS) for path in folder.rglob("*") if path.is_file())
    for path in sorted(paths):
        made_of.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return made_of.hexdigest()[:16]


def load(path: Path):
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if os.environ.get("CUDA_ON_HOST_UNUSED"):
        _write_unused(module, Path(os.environ["CUDA_ON_HOST_UNUSED"]))
    return module


def _write_unused(module, path: Path) -> None:
    """When this process ends, ``path`` holds the functions of the module that it did not call."""
    names = {name for name, value in vars(module).items() if callable(value)}
    atexit.register(lambda: path.write_text("\n".join(sorted(names))))

    def watched(name: str, function):
        def call(*arguments, **options):
            names.discard(name)
            return function(*arguments, **options)

        return call

    for name in tuple(names):
        setattr(module, name, watched(name, getattr(module, name)))


@contextlib.contextmanager
def machine(module, *, descending: bool = False, most_blocks: int = 2**32 - 1):
    """Blocks and threads run in this order, and a grid has at most so many blocks."""
    library = ctypes.CDLL(module.__file__)
    library.cuda_host_set(descending, ctypes.c_uint32(most_blocks))
    try:
        yield
    finally:
        library.cuda_host_set(False, ctypes.c_uint32(2**32 - 1))


@contextlib.contextmanager
def device(module, *, compute_capability: int = 90, most_clusters: int = 2, compiled_for: int = 90):
    """The device is of this generation, runs so many clusters at once, and kernels were compiled for that one."""
    library = ctypes.CDLL(module.__file__)
    library.cuda_host_device(compute_capability, most_clusters, compiled_for)
    try:
        yield
    finally:
        library.cuda_host_device(90, 2, 90)


@contextlib.contextmanager
def size(module, *, processors: int = 4, shared_at_most: int = 227 << 10):
    """The device has so many multiprocessors and gives a block of threads so many bytes of shared memory."""
    library = ctypes.CDLL(module.__file__)
    library.cuda_host_size(processors, ctypes.c_size_t(shared_at_most))
    try:
        yield
    finally:
        library.cuda_host_size(4, ctypes.c_size_t(227 << 10))


@contextlib.contextmanager
def in_use(module):
    """The cuda backend runs CPU tensors on ``module``, and every op on the cuda backend."""
    before, why = (native.cuda, native.CUDA_DEVICE), registry.unavailable("cuda")
    native.cuda, native.CUDA_DEVICE = module, "cpu"
    registry.mark_unavailable("cuda", None)
    try:
        with registry.forced("cuda"):
            yield module
    finally:
        native.cuda, native.CUDA_DEVICE = before
        registry.mark_unavailable("cuda", why)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = (x.detach().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)
