"""Image bytes to PNG files, at the speed of a checksum."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

_STORED = 65535  # bytes in one stored block


def png_size(height: int, width: int, channels: int) -> int:
    """Bytes of the PNG that :func:`encode_png` makes of an image of this shape."""
    raw = height * (1 + width * channels)
    return 63 + raw + 5 * -(-raw // _STORED)


def _fake(images: Tensor) -> Tensor:
    batch, *shape = images.shape
    return images.new_empty((batch, png_size(*shape)))


@define("encode_png(Tensor images) -> Tensor", fake=_fake)
def _impl(images: Tensor) -> Tensor:
    return registry.resolve("encode_png", Call(images.device.type, images.dtype))(images, png_size(*images.shape[1:]))


def encode_png(images: Tensor) -> Tensor:
    """A PNG file of each image, all of one length: the pixels are stored and not compressed.

    A decoder needs nothing special: the file is signature, IHDR, one IDAT chunk and IEND, every row has filter 0, and
    the zlib stream consists of stored blocks of at most 65,535 bytes. So its ``63 + n + 5 ceil(n / 65535)`` bytes, with
    ``n = H (1 + W C)``, are a copy of the pixels beside an Adler-32 and a CRC-32.

    Args:
        images: uint8 ``[B, H, W, C]`` on the CPU; C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
    Returns: uint8 ``[B, size]``; row ``i`` is the file of image ``i``.
    Raises: TypeError or ValueError naming the argument.
    Source: PNG (ISO/IEC 15948), zlib (RFC 1950), stored blocks (RFC 1951, section 3.2.4).
    """
    op = "encode_png"
    _check.tensor(op, "images", images, ndim=4, dtypes=(torch.uint8,))
    _, height, width, channels = images.shape
    if not 1 <= channels <= 4:
        _check.fail(op, "images", "have 1 to 4 channels, the last dimension", images)
    if height < 1 or width < 1 or png_size(height, width, channels) >= 2**31:
        _check.fail(op, "images", "have at least one pixel and fewer than 2^31 bytes each", images)
    if images.device.type != "cpu":
        _check.fail(op, "images", "be on the CPU", images)
    return call(torch.ops.kr_fast.encode_png.default, images)
