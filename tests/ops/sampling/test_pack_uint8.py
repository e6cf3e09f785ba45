"""pack_uint8 on every backend: bytes against exact arithmetic, layouts, special values; arguments."""

import numpy as np
import pytest
import torch
from backends import on_backends
from cuda_on_host import machine

import kr_fast

# 1x1x1: less than a lane, or a thread's four bytes; 3x5x7 = 35 pixels: vectors and a tail, interleaved, groups of four
# bytes that cross images; 1x8x8: digits, one plane; 3x32x32: whole vectors, several blocks; 4x1x9: a channel count that
# is neither 1 nor 3.
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 32, 32), (4, 1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAN, INF = float("nan"), float("inf")


def exact(x: torch.Tensor) -> torch.Tensor:
    """127.5 x + 127.5 is exact in float64 for these x; rounded to float32 once (one fma), then half to even."""
    value = (x.double().clamp(-1, 1) * 127.5 + 127.5).float().double().round()
    return value.nan_to_num(nan=0.0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def images(shape, dtype, layout, device) -> torch.Tensor:
    """Values in and out of range, ties between bytes, and what is no number."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)) * 0.8
    special = [NAN, INF, -INF, 0.0, -1.0 / 127.5, 1.0, -1.0, 1.0 / 127.5]
    x.view(-1)[: len(special)] = torch.tensor(special)[: x.numel()]
    return x.to(device, dtype).contiguous(memory_format=layout)


@pytest.mark.sanitize
@on_backends("pack_uint8")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes(backend, shape, dtype, layout):
    x = images(shape, dtype, layout, backend.device)
    before, expected = x.clone(), exact(x.float())
    got = kr_fast.pack_uint8(x)
    assert got.shape == (5, shape[1], shape[2], shape[0])
    assert got.is_contiguous()
    assert torch.equal(got, expected)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    unaligned = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert torch.equal(kr_fast.pack_uint8(unaligned), expected)
    assert torch.equal(kr_fast.pack_uint8(x[1:4, :, ::2]), expected[1:4, ::2])
    if backend.id == "cuda-host":
        with machine(backend.module, descending=True, most_blocks=2):
            assert torch.equal(kr_fast.pack_uint8(x), expected)


@on_backends("pack_uint8")
def test_every_byte_comes_back(backend):
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    x = (image.permute(0, 3, 1, 2).float() / 127.5 - 1).to(backend.device)
    assert torch.equal(kr_fast.pack_uint8(x).cpu(), image)


@on_backends("pack_uint8")
def test_halves_go_to_even_and_special_values(backend):
    x = torch.tensor(
        [(k + 0.5 - 127.5) / 127.5 for k in (0, 2, 126, 127, 254)] + [NAN, INF, -INF, 1.5, -7.0, 1.0, -1.0]
    )
    got = kr_fast.pack_uint8(x.view(1, 1, 1, -1).to(backend.device)).flatten().tolist()
    assert got[2:4] == [126, 128]  # -1/127.5 and 0 are ties to the bit or nearest to one
    assert got[5:] == [0, 255, 0, 255, 0, 255, 0]
    assert got == exact(x.view(1, 1, 1, -1)).flatten().tolist()


@on_backends("pack_uint8")
def test_strided_and_empty_inputs(backend):
    x = (torch.rand(4, 6, 10, 12) * 2 - 1).to(backend.device)
    for view in (x[:, :3], x[::2, 1:4, 2:8, 3:9], x.transpose(2, 3)):
        assert torch.equal(kr_fast.pack_uint8(view), exact(view))
    assert kr_fast.pack_uint8(x[:0]).shape == (0, 10, 12, 6)
    assert kr_fast.pack_uint8(x[:, :, :0]).shape == (4, 0, 12, 6)


def test_float64_takes_the_reference():
    x = torch.linspace(-1.2, 1.2, 3 * 64, dtype=torch.float64).view(1, 3, 8, 8)
    expected = np.rint(np.clip(x.numpy(), -1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.array_equal(kr_fast.pack_uint8(x).numpy(), expected)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(3, 4, 4), ValueError, r"x must have 4 dimensions, got float32 \[3, 4, 4\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), TypeError, "x must be a floating point tensor, got int32"),
        (np.zeros((1, 3, 4, 4)), TypeError, "x must be a tensor"),
    ],
)
def test_bad_arguments_are_named(x, error, text):
    with pytest.raises(error, match="pack_uint8: " + text):
        kr_fast.pack_uint8(x)


def test_opcheck_and_compile():
    x = torch.rand(2, 3, 4, 4)
    torch.library.opcheck(torch.ops.kr_fast.pack_uint8, (x,))
    assert torch.equal(torch.compile(kr_fast.pack_uint8, fullgraph=True, backend="eager")(x), kr_fast.pack_uint8(x))
