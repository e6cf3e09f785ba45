"""encode_png on every backend: files read by PIL, inflated by zlib, checksums of every length, arguments."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from backends import on_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kr_fast
from kr_fast.backends import registry

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# 1x1: the least; 8x8x1: digits, one vector; 28x28x1, 32x32x3: within one stored block, with a tail; 224x224x3: three
# stored blocks, rows across their seams; 255x256x1, 1x65534: a block that is full to the byte; 1x65535: a second block
# of one byte; 65535x1x2: a filter byte at a seam; 2x40000x2: rows longer than a block.
SHAPES = [
    (1, 1, 1), (1, 1, 4), (8, 8, 1), (28, 28, 1), (32, 32, 3), (7, 5, 2), (224, 224, 3), (255, 256, 1), (1, 65534, 1),
    (1, 65535, 1), (21846, 1, 2), (2, 40000, 2),
]  # fmt: skip


def random(batch, shape, seed=0):
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def chunks(file):
    """(type, data) of each chunk, its CRC checked by zlib."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, []
    while at < len(file):
        (length,) = struct.unpack_from(">I", file, at)
        (crc,) = struct.unpack_from(">I", file, at + 8 + length)
        assert crc == zlib.crc32(file[at + 4 : at + 8 + length])
        found.append((file[at + 4 : at + 8], file[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


everywhere = on_backends("encode_png")


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pil_decodes_the_same_pixels(backend, shape):
    """PIL reads the files, and zlib's checksums make those of C++ the reference's."""
    images = random(3, shape)
    before = images.clone()
    files = kr_fast.encode_png(images)
    for file, image in zip(files, images.numpy(), strict=True):
        decoded = Image.open(io.BytesIO(file.numpy().tobytes()))
        assert decoded.mode == MODES[shape[2]]
        assert np.array_equal(np.asarray(decoded).reshape(shape), image)
    with registry.forced("reference"):
        assert torch.equal(files, kr_fast.encode_png(images))
    assert torch.equal(images, before)


@everywhere
def test_structure(backend):
    """Chunks in order, the stream inflated by zlib (which checks the Adler-32), filter 0 in each row."""
    (image,) = images = random(1, (224, 224, 3))
    (ihdr, header), (idat, stream), (iend, nothing) = chunks(kr_fast.encode_png(images)[0].numpy().tobytes())
    assert (ihdr, idat, iend, nothing) == (b"IHDR", b"IDAT", b"IEND", b"")
    assert struct.unpack(">IIBBBBB", header) == (224, 224, 8, 2, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(stream), np.uint8).reshape(224, 1 + 224 * 3)
    assert not rows[:, 0].any()
    assert np.array_equal(rows[:, 1:].reshape(224, 224, 3), image.numpy())


@on_backends("encode_png", "cpu")
@pytest.mark.parametrize("value", [0, 255])
def test_checksums_of_every_length(backend, value):
    """Every tail of 16, 64 and 256 bytes, and the largest sums that the lanes must hold."""
    for width in (*range(1, 600), 4095, 4096, 65000):
        image = torch.full((1, 1, width, 1), value, dtype=torch.uint8)
        (_, (_, stream), _) = chunks(kr_fast.encode_png(image)[0].numpy().tobytes())
        assert zlib.decompress(stream) == b"\0" + bytes([value]) * width


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**31))
def test_any_shape(height, width, channels, batch, seed):
    images = random(batch, (height, width, channels), seed)
    files = kr_fast.encode_png(images)
    with registry.forced("reference"):
        assert torch.equal(files, kr_fast.encode_png(images))


@on_backends("encode_png", "cpu")
def test_more_threads_than_images_and_more_images_than_threads(backend, by_threads):
    for batch, shape in ((1, (64, 64, 3)), (2, (224, 224, 3)), (301, (16, 16, 3))):
        images = random(batch, shape)
        expected, *others = by_threads(lambda images=images: kr_fast.encode_png(images))
        assert all(torch.equal(expected, each) for each in others)


@everywhere
def test_strided_and_empty_inputs(backend):
    images = random(4, (10, 12, 4))
    for view in (images[..., :3], images[::2, 2:8, 3:9], images.transpose(1, 2), images.expand(4, 10, 12, 4)):
        assert torch.equal(kr_fast.encode_png(view), kr_fast.encode_png(view.clone().contiguous()))
    empty = kr_fast.encode_png(images[:0])
    assert empty.shape == (0, kr_fast.encode_png(images).shape[1])


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), TypeError, "images must be a tensor"),
        (torch.zeros(1, 4, 4, 3), TypeError, r"images must be uint8, got float32 \[1, 4, 4, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"images must have 4 dimensions, got uint8 \[4, 4, 3\]"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), ValueError, "images must have 1 to 4 channels, the last"),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), ValueError, "images must have at least one pixel"),
        (torch.zeros(0, 1 << 16, 1 << 15, 1, dtype=torch.uint8), ValueError, "fewer than 2\\^31 bytes each"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device="meta"), ValueError, "images must be on the CPU"),
    ],
)
def test_bad_arguments_are_named(images, error, text):
    with pytest.raises(error, match="encode_png: .*" + text):
        kr_fast.encode_png(images)


def test_opcheck_and_compile():
    images = random(2, (4, 5, 3))
    torch.library.opcheck(torch.ops.kr_fast.encode_png, (images,))
    compiled = torch.compile(kr_fast.encode_png, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), kr_fast.encode_png(images))
