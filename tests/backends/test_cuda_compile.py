"""No CUDA kernel spills registers: of the module that was built, and compiled for other generations."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from triton_compile import resource_usage

from kr_fast.backends import native

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
OTHERS = (100,)  # Blackwell, which setup.py leaves to PTX and conftest.py to the nightly run

# 64 registers leave room for 1024 threads of a multiprocessor's 65,536: most kernels hide memory latency by that.
# By a part of the mangled name, which holds the source's: where a thread has four 16-byte loads in flight, as in a
# solver step, 768 threads (80 registers) do as well. Kernels of the distillation loss hold whole rows in registers, up
# to 32 elements of student and teacher each; 128 registers leave 16 warps, which read 2 KB or more each before they
# wait. So do those of membership_signals.
REGISTERS = {"solver_step": 80, "group_norm_silu": 80, "thread_rows": 128, "warp_rows": 128, "block_rows": 128}
REGISTERS |= {"thread_signals": 64, "warp_signals": 128, "block_signals": 128}
REGISTERS |= {"4vote": 96}  # 32 counters
REGISTERS |= {"score_targets": 128, "pool_shadows": 96}  # a block is a warp: 16 of them
# 64 sums of a convolution a thread; the block of 64 channels has a multiprocessor to itself for its shared memory.
REGISTERS |= {"residual_blockILi64": 168, "residual_block": 128}
REGISTERS |= {"cluster_rows": 128}  # 80 where three blocks of 256 threads are to share a multiprocessor

pytestmark = pytest.mark.compile


@functools.cache
def known_archs() -> set[int]:
    """The generations that this nvcc can compile for; sm_100 came with CUDA 12.8."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"sm_(\d+)", listed)}


def check(name: str, stack: int, registers: int) -> None:
    """By the kernel's mangled name; stack bytes are spilled registers, as no kernel has arrays of its own."""
    assert stack == 0, name
    assert registers <= next((most for part, most in REGISTERS.items() if part in name), 64), (name, registers)


@pytest.mark.skipif(native.cuda is None, reason="needs kr_fast._cuda")
def test_built_module_spills_nothing():
    """Of the installed module: to compile every source for this question alone takes most of a minute."""
    pytest.importorskip("triton")
    found = resource_usage(Path(native.cuda.__file__))
    if 90 not in {kernel.capability for kernel in found}:
        pytest.skip("needs kr_fast._cuda built for 9.0")
    built = {Path(kernel.source).name for kernel in found}
    assert built >= {path.name for path in SOURCES}, "kr_fast._cuda is older than its sources: build it again"
    for kernel in found:
        check(kernel.name, kernel.stack, kernel.registers)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
@pytest.mark.skipif(not SOURCES, reason="needs the source tree")
@pytest.mark.parametrize("capability", [OTHERS], ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(tmp_path, source, capability):
    """One call of nvcc for several generations, which reads the headers once."""
    if missing := set(capability) - known_archs():
        pytest.skip(f"needs an nvcc that knows {', '.join(f'sm_{arch}' for arch in sorted(missing))}")
    done = subprocess.run(
        [
            "nvcc",
            "-fatbin",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in capability),
            "-O3",
            "-std=c++17",
        ]
        + ["-I", ROOT / "csrc", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Werror", "all-warnings"]
        + ["-o", tmp_path / "out.fatbin", source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)", done.stderr)
    stacks = [int(number) for number in re.findall(r"(\d+) bytes stack frame", done.stderr)]
    assert {int(arch) for _, arch in kernels} == set(capability)
    assert len(stacks) >= len(kernels), done.stderr
    assert not any(stacks), done.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    for (name, _), count in zip(kernels, registers, strict=True):
        check(name, 0, count)
