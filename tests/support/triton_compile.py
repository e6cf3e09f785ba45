"""Triton kernels compiled for GPUs that are not there, and what the compiler made of them."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


def build(
    function, signature: dict, constants: dict, *, capability: int, warps: int = 4, aligned: tuple[str, ...] = (),
    fusion: bool = True,
):  # fmt: skip
    """The kernel for ``capability``; ``signature`` names the types of its arguments but those in ``constants``.

    Both may name what this kernel does not take, and ``constants`` its num_warps. Pointers count as 16-byte aligned, as
    torch allocates, and so do the integers named in ``aligned``. With ``fusion`` the compiler may contract products
    into sums.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or name in aligned
    }
    constexprs = {(names.index(key),): value for key, value in constants.items() if key in names}
    source = ASTSource(fn=function, signature=types, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": constants.get("num_warps", warps), "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(built) -> int:
    """Stack bytes a thread: register spills and nothing else, for kernels without arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        (kernel,) = resource_usage(path)
    return kernel.stack


class Usage(NamedTuple):
    """What a thread of a kernel holds, in machine code for one generation of GPUs."""

    capability: int
    source: str  # path of the CUDA source, empty for a cubin
    name: str  # mangled
    registers: int
    stack: int  # bytes


def resource_usage(binary: Path) -> list[Usage]:
    """Of every kernel in a cubin, or in a library that nvcc made, by the cuobjdump of Triton's wheel."""
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    capability, source, found = 0, "", []
    for arch, path, name, registers, stack in re.findall(
        r"^arch = sm_(\d+)|^identifier = (.+)|Function (\S+):\s+REG:(\d+) STACK:(\d+)", text, re.MULTILINE
    ):
        capability, source = int(arch or capability), path or source
        if name:
            found.append(Usage(capability, source, name, int(registers), int(stack)))
    return found


def widest_load(built) -> int:
    """Bytes of the widest load from global memory in the PTX."""
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"ld\.global(?:\.[a-z0-9_:]+)*?(?:\.v(\d))?\.[bfsu](\d+)", built.asm["ptx"])
    ]
    return max(widths, default=0)


def inexact_instructions(built) -> set[str]:
    """Float arithmetic in the PTX that is approximate, flushes subnormals, or that ptxas may still contract."""
    result = re.findall(
        r"\b((?:fma|mul|add|sub|mad|div|sqrt|rcp|rsqrt|ex2|lg2|sin|cos|cvt)\.[\w.]*f32[\w.]*)", built.asm["ptx"]
    )
    exact = re.compile(
        r"(fma|mul|add|sub|div|sqrt)\.rn\.f32(x2)?$|cvt\.rn\.f32\.[us]\d+$|cvt\.f32\.b?f16$|cvt\.rn\.f16(x2)?\.f32$"
    )
    return {name for name in result if not exact.match(name)}


def read(function, signature: dict, constants: dict):
    """What the first pass of a compilation makes for compute capability 9.0; it finds what the language forbids."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    target, names = GPUTarget("cuda", 90, 32), function.arg_names
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    constexprs = {(names.index(key),): value for key, value in constants.items() if key in names}
    options = backend.parse_options({"num_warps": 4, "sanitize_overflow": False})
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source = ASTSource(fn=function, signature=types, constexprs=constexprs)
    return str(source.make_ir(target, options, functions, modules, context))
