"""The GPU kernels of pack_uint8: Triton in the interpreter and compiled, the CUDA source on the CPU; bytes of the CPU.

Shapes: 1x1x1: less than a thread's four bytes; 3x5x7: a total that is no multiple of four, groups that cross images;
1x8x8: one plane; 3x32x32: several blocks; 4x1x9: a channel count that is neither 1 nor 3.
"""

import os

import pytest
import torch
from cuda_on_host import in_use, machine

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.calls import Call

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 32, 32), (4, 1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(shape, dtype, layout) -> torch.Tensor:
    """Values in and out of range, ties between bytes, and what is no number."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)) * 0.8
    special = [float("nan"), float("inf"), float("-inf"), 0.0, -1.0 / 127.5, 1.0, -1.0, 1.0 / 127.5]
    x.view(-1)[: len(special)] = torch.tensor(special)[: x.numel()]
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_interpreter_makes_the_bytes_of_the_cpu(shape, dtype, layout):
    x = images(shape, dtype, layout)
    wanted = kr_fast.pack_uint8(x)
    with registry.forced("triton"):
        assert torch.equal(kr_fast.pack_uint8(x), wanted)
        assert torch.equal(kr_fast.pack_uint8(x[1:4, :, ::2]), wanted[1:4, ::2])
        assert kr_fast.pack_uint8(x[:0]).shape == wanted[:0].shape


@pytest.mark.sanitize
@pytest.mark.skipif(interpreted, reason="needs no interpreter")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cuda_makes_the_bytes_of_the_cpu(host_cuda, shape, dtype, layout):
    x = images(shape, dtype, layout)
    unaligned = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    wanted = kr_fast.pack_uint8(x)
    with in_use(host_cuda):
        for most_blocks in (2**32 - 1, 2):
            with machine(host_cuda, descending=True, most_blocks=most_blocks):
                assert torch.equal(kr_fast.pack_uint8(x), wanted)
        assert torch.equal(kr_fast.pack_uint8(unaligned), wanted)
        assert torch.equal(kr_fast.pack_uint8(x[1:4, :, ::2]), wanted[1:4, ::2])
        assert kr_fast.pack_uint8(x[:0]).shape == wanted[:0].shape


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_on_a_gpu_are_those_of_the_cpu(backend, shape, dtype, layout):
    if why := registry.refusal("pack_uint8", backend, Call("cuda", dtype)):
        pytest.skip(why)
    x = images(shape, dtype, layout)
    with registry.forced(backend):
        assert torch.equal(kr_fast.pack_uint8(x.cuda()).cpu(), kr_fast.pack_uint8(x))


@pytest.mark.compile
@pytest.mark.skipif(interpreted, reason="the interpreter replaces the compiler in this process")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_without_spills(capability, channels, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kr_fast.kernels.sampling import pack_uint8 as kernels
    from triton_compile import build, inexact_instructions, spilled_bytes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"x": f"*{dtype}", "out": "*u8", "total": "i32", "pixels": "i32"}
    constants = {"CHANNELS": channels, "BLOCK": kernels.BLOCK}
    built = build(
        kernels.pack, signature, constants, capability=capability, warps=kernels.WARPS, aligned=("total", "pixels"),
        fusion=False,
    )  # fmt: skip
    assert inexact_instructions(built) == set()
    assert spilled_bytes(built) == 0
    if channels == 1:
        assert "st.global.v2.b32" in built.asm["ptx"] or "st.global.b32" in built.asm["ptx"]
