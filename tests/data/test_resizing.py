"""The compiled resampling against its definition, the memory that Pillow lends, and the sizes of plain JPEGs."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kr_fast.backends import native, registry
from kr_fast.data.pixels import resizing
from kr_fast.data.pixels.decoding import UnreadableError, read_header
from kr_fast.data.pixels.jpeg import plain_header
from kr_fast.data.pixels.resizing import COMPILED, Axis, resize, resized_reference
from kr_fast.data.pixels.views import view

draw = np.random.default_rng(0)
compiled = pytest.mark.skipif(COMPILED is None, reason="kr_fast._cpu lacks resize_image: build it again")

# (height, width, channels, those that are kept), to (height, width).
CASES = {
    "reduced: whole blocks of 8 rows and a rest, columns by 16 and a rest": ((61, 97, 4, 3), (13, 11)),
    "columns beyond one chunk of 1,024 sums": ((40, 600, 3, 3), (9, 8)),
    "by more than 8, an odd number of rows": ((190, 90, 4, 3), (8, 8)),
    "enlarged": ((5, 3, 3, 3), (17, 16)),
    "enlarged and reduced, grey": ((7, 90, 1, 1), (31, 9)),
    "one pixel": ((1, 1, 1, 1), (8, 8)),
    "one row": ((1, 50, 4, 3), (2, 7)),
    "two channels": ((30, 20, 2, 2), (8, 8)),
}


def isas():
    return [] if COMPILED is None else native.cpu.isa_available()


@pytest.fixture(params=isas())
def isa(request):
    before = native.isa()
    native.cpu.set_isa(request.param)
    yield request.param
    native.cpu.set_isa(before)


@compiled
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_gives_the_definition_bit_for_bit(isa, case):
    (height, width, channels, kept), to = CASES[case]
    whole = draw.integers(0, 256, (height + 2, width + 3, channels), dtype=np.uint8)
    before, out = whole.copy(), np.full((to[0] + 2, to[1], kept), 7, np.uint8)
    for pixels in (whole[1:-1, 2:-1], np.asfortranarray(whole)[1:-1, 2:-1]):
        resize(pixels, out[1:-1], "stretch")
        expected = resized_reference(pixels, Axis(height, to[0]), Axis(width, to[1]))
        assert np.array_equal(out[1:-1], expected[..., :kept])
        assert (out[[0, -1]] == 7).all()
    assert np.array_equal(whole, before)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 700), to=st.integers(1, 90))
def test_weights_are_the_triangle_and_keep_constants(size, to):
    axis = Axis(size, to)
    assert (axis.weights >= 0).all()
    assert (axis.weights.sum(1, dtype=np.int64) == 1 << 14).all()
    assert axis.first.min() >= 0
    assert (axis.first + axis.weights.shape[1]).max() <= size
    ratio = size / to
    centres = (np.arange(to)[:, None] + 0.5) * ratio
    exact = (1 - np.abs(np.arange(size) + 0.5 - centres) / max(1, ratio)).clip(0)
    exact *= (1 << 14) / exact.sum(1, keepdims=True)
    given_weights = np.zeros((to, size))
    np.put_along_axis(given_weights, axis.first[:, None] + np.arange(axis.weights.shape[1]), axis.weights, 1)
    assert np.abs(given_weights - exact).max() < 1.001
    white, out = np.full((size, 3, 1), 255, np.uint8), np.empty((to, 2, 1), np.uint8)
    resize(white, out, "stretch")
    assert (out == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 9), (2100, 2100)])  # the last in several blocks: copied
def test_pixels_are_seen_where_pillow_keeps_them(mode, size, monkeypatch):
    channels = len(mode)
    pixels = draw.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).copy()
    seen, owner = view(image)
    assert np.array_equal(seen[..., :channels], pixels)
    del image  # the owner keeps them
    assert np.array_equal(seen[..., :channels], pixels)
    del seen, owner
    monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)  # as before 11.2
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    assert np.array_equal(view(image)[0], pixels)


def saved(mode, **options):
    buffer = io.BytesIO()
    Image.new(mode, (30, 17)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6
PLAIN = {
    "grey": (saved("L"), (17, 30, 1)),
    "colour": (saved("RGB"), (17, 30, 3)),
    "progressive": (saved("RGB", progressive=True), (17, 30, 3)),
    "CMYK": (saved("CMYK"), (17, 30, 4)),
    "a comment": (saved("RGB", comment=b"\xff\xc0 no frame"), (17, 30, 3)),
    "a profile of colours": (saved("RGB", icc_profile=b"\xff\xc0" * 40000), (17, 30, 3)),
    "a table of restarts": (saved("RGB", restart_marker_rows=1), (17, 30, 3)),
    "turned": (saved("RGB", exif=ORIENTED), None),
    "cut": (saved("RGB")[:100], None),
    "nothing": (b"", None),
    "no JPEG": (b"\x89PNG", None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_of_plain_jpegs(name, tmp_path):
    content, expected = PLAIN[name]
    assert plain_header(io.BytesIO(content)) == expected
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    if expected is None and name != "turned":
        with pytest.raises(UnreadableError):
            read_header(file)
        return
    header = read_header(file)
    assert (header.height, header.width) == ((30, 17) if name == "turned" else (17, 30))
    assert header.kind == ("grey" if name == "grey" else "colour")


@settings(deadline=None, max_examples=100)
@given(at=st.integers(0, 180), byte=st.integers(0, 255))
def test_a_plain_header_of_a_damaged_jpeg_is_pillows_or_pillow_refuses_it(at, byte):
    content = bytearray(PLAIN["colour"][0])
    content[at] = byte
    found = plain_header(io.BytesIO(content))
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            assert found in (None, (image.height, image.width, len(image.mode)))
    except OSError:
        pass  # decoding refuses it


def test_numpy_in_place_of_the_compiled_function_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(resizing, "COMPILED", None)
    monkeypatch.setattr(registry, "unavailable", lambda backend: "not built")
    resizing._say_slow.cache_clear()
    out = np.empty((4, 4, 1), np.uint8)
    with caplog.at_level("WARNING", "kr_fast"):
        for _ in range(2):
            resize(np.full((9, 9, 1), 7, np.uint8), out, "stretch")
    assert caplog.messages == ["data: images are brought to one size by numpy, several times slower: not built"]
    assert (out == 7).all()
