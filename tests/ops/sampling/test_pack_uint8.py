"""pack_uint8: bytes against exact arithmetic, layouts, special values, arguments."""

import numpy as np
import pytest
import torch

import kr_fast

_cpu = pytest.importorskip("kr_fast._cpu", reason="kr_fast._cpu is not built")
# 1x1x1: less than a lane; 3x5x7 = 35 pixels: vectors and a tail, interleaved; 1x8x8: digits, one plane;
# 3x32x32: whole vectors; 4x1x9: a channel count that is neither 1 nor 3.
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 32, 32), (4, 1, 9)]


def exact(x: torch.Tensor) -> torch.Tensor:
    """127.5 x + 127.5 is exact in float64 for these x; rounded to float32 once (one fma), then half to even."""
    value = (x.double().clamp(-1, 1) * 127.5 + 127.5).float().double().round()
    return value.nan_to_num(nan=0.0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes(isa, shape, layout):
    x = (torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)) * 0.8).contiguous(memory_format=layout)
    before = x.clone()
    got = kr_fast.pack_uint8(x)
    assert got.shape == (5, shape[1], shape[2], shape[0])
    assert got.is_contiguous()
    assert torch.equal(got, exact(x))
    assert torch.equal(x, before)


def test_every_byte_comes_back(isa):
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    x = image.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(kr_fast.pack_uint8(x), image)
    assert torch.equal(kr_fast.pack_uint8(x.double()), image)


def test_halves_go_to_even_and_special_values(isa):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor(
        [(k + 0.5 - 127.5) / 127.5 for k in (0, 2, 126, 127, 254)] + [nan, inf, -inf, 1.5, -7.0, 1.0, -1.0]
    )
    got = kr_fast.pack_uint8(x.view(1, 1, 1, -1)).flatten().tolist()
    assert got[2:4] == [126, 128]  # -1/127.5 and 0 are ties to the bit or nearest to one
    assert got[5:] == [0, 255, 0, 255, 0, 255, 0]
    assert got == exact(x.view(1, 1, 1, -1)).flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_its_float32_value(isa, dtype):
    x = torch.linspace(-1.2, 1.2, 3 * 64).view(1, 3, 8, 8).to(dtype)
    assert torch.equal(kr_fast.pack_uint8(x), exact(x.float()))


def test_float64_takes_the_reference():
    x = torch.linspace(-1.2, 1.2, 3 * 64, dtype=torch.float64).view(1, 3, 8, 8)
    want = np.rint(np.clip(x.numpy(), -1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.array_equal(kr_fast.pack_uint8(x).numpy(), want)


def test_strided_and_empty_inputs(isa):
    x = torch.rand(4, 6, 10, 12) * 2 - 1
    for view in (x[:, :3], x[::2, 1:4, 2:8, 3:9], x.transpose(2, 3)):
        assert torch.equal(kr_fast.pack_uint8(view), exact(view))
    assert kr_fast.pack_uint8(x[:0]).shape == (0, 10, 12, 6)
    assert kr_fast.pack_uint8(x[:, :, :0]).shape == (4, 0, 12, 6)


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
