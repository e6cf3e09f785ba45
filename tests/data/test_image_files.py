"""Pixels of every mode that Pillow reads, against float64; and files that no one should decode."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kr_fast import data
from kr_fast.data import image_files
from kr_fast.data.pixels.decoding import NOTES
from kr_fast.data.pixels.resizing import resize_images
from kr_fast.runtime.errors import UserError

SIDE = 8
LIMITS = (8, 224)
draw = np.random.default_rng(0)
BYTES = draw.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
COLOUR = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = draw.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
DEEP = draw.integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
LEVELS = np.rint(DEEP / 257)


def png(width, height, depth, kind, rows, extra=b""):
    """A PNG of any depth: Pillow does not write 16-bit colour."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    pixels = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def on_white(colour, alpha):
    a = alpha[..., None].astype(np.float64) / 255
    return np.rint(colour.reshape(SIDE, SIDE, -1) * a + 255 * (1 - a))


def read(tmp_path, *contents, sizes=LIMITS, **options):
    """(pixels, notes but for that on their range) of files with these contents."""
    files = []
    for index, content in enumerate(contents):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(content)
    result = image_files.read({"images": files}, sizes, data.ReadOptions(**options))
    return result.pixels["images"], result.notes[1:]


PALETTE = Image.fromarray(BYTES % 4).convert("P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
RED = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
CLEAR = np.where(BYTES % 4 == 1, 0, 255)
CASES = {
    "grey png": (saved(Image.fromarray(BYTES), "PNG"), BYTES[..., None], []),
    "grey bmp": (saved(Image.fromarray(BYTES), "BMP"), BYTES[..., None], []),
    "grey tiff": (saved(Image.fromarray(BYTES), "TIFF"), BYTES[..., None], []),
    "lzw tiff": (saved(Image.fromarray(COLOUR), "TIFF", compression="tiff_lzw"), COLOUR, []),
    "pgm": (saved(Image.fromarray(BYTES), "PPM"), BYTES[..., None], []),
    "ppm": (saved(Image.fromarray(COLOUR), "PPM"), COLOUR, []),
    "webp": (saved(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR, []),
    "gif": (saved(PALETTE, "GIF"), RED[BYTES % 4], []),
    "1 bit": (saved(Image.fromarray(BYTES > 99), "PNG"), (BYTES > 99)[..., None] * 255, []),
    "palette": (saved(PALETTE, "PNG"), RED[BYTES % 4], []),
    "palette, clear": (saved(PALETTE, "PNG", transparency=1), on_white(RED[BYTES % 4], CLEAR), ["alpha"]),
    "cmyk": (saved(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR, []),
    "rgba": (saved(Image.fromarray(np.dstack([COLOUR, ALPHA])), "PNG"), on_white(COLOUR, ALPHA), ["alpha"]),
    "rgba, opaque": (saved(Image.fromarray(np.dstack([COLOUR, ALPHA * 0 + 255])), "PNG"), COLOUR, []),
    "la": (saved(Image.fromarray(np.dstack([BYTES, ALPHA]), "LA"), "PNG"), on_white(BYTES, ALPHA), ["alpha"]),
    "shape in alpha": (
        saved(Image.fromarray(np.dstack([COLOUR * 0, ALPHA])), "PNG"), on_white(COLOUR * 0, ALPHA), ["alpha"]),
    "clear level": (
        saved(Image.fromarray(BYTES), "PNG", transparency=int(BYTES[0, 0])),
        on_white(BYTES, np.where(BYTES[0, 0] == BYTES, 0, 255)), ["alpha"]),
    "clear colour": (
        saved(Image.fromarray(COLOUR), "PNG", transparency=tuple(map(int, COLOUR[0, 0]))),
        on_white(COLOUR, np.where((COLOUR[0, 0] == COLOUR).all(2), 0, 255)), ["alpha"]),
    "1 bit, clear": (
        saved(Image.fromarray(BYTES > 99), "PNG", transparency=0), np.full((SIDE, SIDE, 1), 255), ["alpha"]),
    "16-bit png": (saved(Image.fromarray(DEEP), "PNG"), LEVELS[..., None], []),
    "16-bit tiff": (saved(Image.fromarray(DEEP), "TIFF"), LEVELS[..., None], []),
    "16-bit tiff, big-endian": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), LEVELS[..., None], []),
    "16-bit pgm": (saved(Image.fromarray(DEEP), "PPM"), LEVELS[..., None], []),
    "32-bit tiff": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), LEVELS[..., None], []),
    "16-bit png, clear": (
        saved(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[0, 0])),
        np.where(DEEP[0, 0] == DEEP, 255, LEVELS)[..., None], ["alpha"]),
    "float tiff": (saved(Image.fromarray(DEEP.astype(np.float32) / 65535), "TIFF"), LEVELS[..., None], []),
    "16-bit colour": (png(SIDE, SIDE, 16, 2, COLOUR.reshape(SIDE, -1).astype(np.uint16) * 257), COLOUR, ["deep"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_file(tmp_path, name):
    content, expected, keys = CASES[name]
    pixels, notes = read(tmp_path, content, content)
    assert pixels.shape == (2, *expected.shape)
    assert np.array_equal(pixels[0], expected)
    assert np.array_equal(pixels[1], expected)
    assert notes == [NOTES[key].format("2 images") for key in keys]


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_before_sizes_are_compared(tmp_path, format, orientation):
    upright = Image.new("L" if format != "WEBP" else "RGB", (9, 17))
    upright.paste(255, (0, 0, 4, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the operation that undoes it, of Transpose
    image = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if format != "TIFF" else {"tiffinfo": {0x0112: orientation}}
    pixels, notes = read(tmp_path, saved(image, format, **options), saved(upright, format))
    assert pixels.shape[1:3] == (17, 9)
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() < 90  # JPEG and WebP lose a little
    assert notes == ([] if orientation == 1 else ["EXIF orientation applied to 1 image"])


def test_several_frames_are_told(tmp_path):
    frames = [Image.new("L", (9, 9), level) for level in (2, 250)]
    for format in ("TIFF", "GIF"):
        pixels, notes = read(tmp_path, saved(frames[0], format, save_all=True, append_images=frames[1:]))
        assert notes == ["the first frame alone read of 1 image"]
        assert pixels.max() < 3


@pytest.mark.parametrize("most", [65535, 4095, 300])
def test_16_bit_folders_are_scaled_by_one_rule(tmp_path, most):
    """Full 16 bits come down to 8; of 9 to 15 bits the window is that of numpy's percentiles over all images."""
    images = [np.random.default_rng(index).integers(0, most + 1, (SIDE, SIDE)).astype(np.uint16) for index in range(16)]
    for index, (image, name) in enumerate(zip(images, "aabbabab" * 2, strict=True)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    result = data.load(tmp_path)
    every = np.concatenate([split.images for split in (result.train, result.val, result.test)])[..., 0]
    low, high = np.percentile(images, (0.5, 99.5), method="inverted_cdf") if most < 32768 else (0, 65535)
    expected = [np.rint((image.astype(np.float64) - low) * 255 / (high - low)).clip(0, 255) for image in images]
    assert sorted(each.tobytes() for each in every) == sorted(each.astype(np.uint8).tobytes() for each in expected)
    done = "the largest" if most == 65535 else f"windowed to [{low}, {high}], their 0.5 and 99.5 percentiles"
    assert done in result.notes[0]


def test_16_bits_that_are_refused(tmp_path):
    dark = png(SIDE, SIDE, 16, 2, COLOUR.reshape(SIDE, -1).astype(np.uint16) * 16)
    with pytest.raises(UserError, match="^data: images of 16-bit colour must use their 16 bits"):
        read(tmp_path, dark)
    with pytest.raises(UserError, match="^data: images must hold more values than 0 and 1"):
        read(tmp_path, saved(Image.fromarray(DEEP % 2), "PNG"))
    with pytest.raises(UserError, match="^data: every image must have one depth, got 2 of 16-bit grey, 1 of grey"):
        read(tmp_path, *[saved(Image.fromarray(DEEP), "PNG")] * 2, saved(Image.fromarray(BYTES), "PNG"))


def test_all_odd_files_are_counted_and_three_are_named(tmp_path):
    small, large = (saved(Image.new("L", (side, side)), "PNG") for side in (9, 10))
    colour = saved(Image.new("RGB", (9, 9)), "PNG")
    with pytest.raises(UserError) as error:
        read(tmp_path, *[small] * 9, *[large] * 5, colour)
    assert str(error.value).startswith("data: every image must have one size and one mode, got 9 of 9 x 9 grey, ")
    where = tmp_path.name
    assert f"5 of 10 x 10 grey ({where}/9.png, {where}/10.png, {where}/11.png and 2 more)" in str(error.value)
    assert f"1 of 9 x 9 colour ({where}/14.png); image_size brings them to one size" in str(error.value)
    with pytest.raises(
        UserError, match=r"every image must be readable, got 4 that are not: .*0.png .*and 1 more; --skip-"
    ):
        read(tmp_path, *[b"text"] * 4, small)
    with pytest.raises(UserError, match="^data: image size must be 8 to 224 px on both sides, got 7 x 300"):
        read(tmp_path, saved(Image.new("L", (300, 7)), "PNG"))
    assert read(tmp_path, saved(Image.new("L", (300, 7)), "PNG"), sizes=None)[0].shape == (1, 7, 300, 1)


def test_modes_of_8_bits_are_read_together(tmp_path):
    pixels, notes = read(tmp_path, *(CASES[name][0] for name in ("grey png", "ppm", "rgba", "1 bit", "la")))
    assert pixels.shape == (5, SIDE, SIDE, 3)
    for row, name in enumerate(("grey png", "ppm", "rgba", "1 bit", "la")):
        assert np.array_equal(pixels[row], np.broadcast_to(CASES[name][1], (SIDE, SIDE, 3)))
    assert notes == ["alpha composed on white in 2 images", "3 images of grey read as RGB"]


# Of each mode, at a size that is reduced, enlarged or both, and no square.
@pytest.mark.parametrize("size", [(40, 20), (12, 9), (15, 60)])
@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_resized_images_are_those_of_a_triangle_filter_in_float64(tmp_path, size, how):
    """Within one rounding to 8 bits, and a little for the one between rows and columns."""
    width, height = size
    colour = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    contents = [saved(Image.fromarray(colour[..., 0]), "PNG"), saved(Image.fromarray(colour), "PPM")]
    pixels, notes = read(tmp_path, *contents, image_size=16, resize=how)
    assert np.abs(pixels[0] - triangle(colour[..., :1], 16, how)).max() <= 0.6
    assert np.abs(pixels[1] - triangle(colour, 16, how)).max() <= 0.6
    assert notes[1] == f"2 images of {height} x {width} brought to one size by {how}" + (
        ", 2 of them enlarged" if max(size) < 16 else ""
    )
    assert np.array_equal(resize_images(colour[None], 16, how)[0], pixels[1])


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_large_reductions_do_not_alias(tmp_path, how):
    """By 10 to 13: smooth images as by the triangle, the finest pattern grey."""
    rows, columns = np.mgrid[:160, :208]
    smooth = np.rint(127 + 90 * np.sin(rows / 40) * np.cos(columns / 50)).astype(np.uint8)
    fine = ((rows + columns) % 2 * 255).astype(np.uint8)
    pixels, _ = read(
        tmp_path, *(saved(Image.fromarray(each), "PNG") for each in (smooth, fine)), image_size=16, resize=how
    )
    assert np.abs(pixels[0] - triangle(smooth[..., None], 16, how)).max() <= 0.6
    inside = pixels[1][3:-3]  # rows that are not padded
    assert inside.min() >= 126
    assert inside.max() <= 129


def triangle(image, size, how):
    height, width, _ = image.shape
    inner = [size, size]
    if how == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    if how == "pad":
        inner = [round(side * size / max(height, width)) for side in (height, width)]
    for axis, side in enumerate(image.shape[:2]):
        ratio = side / inner[axis]
        centres = (np.arange(inner[axis]) + 0.5) * ratio
        weights = 1 - np.abs(np.arange(side) + 0.5 - centres[:, None]) / max(ratio, 1)
        weights = weights.clip(0)
        image = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), image, (1, axis)), 0, axis)
    before = [(size - side) // 2 for side in inner]
    return np.pad(image, [(at, size - side - at) for at, side in zip(before, inner, strict=True)] + [(0, 0)])


def test_squares_need_no_way_of_resizing(tmp_path):
    square, odd = (saved(Image.new("L", (side, 20), 99), "PNG") for side in (20, 30))
    assert (read(tmp_path, square, image_size=8)[0] == 99).all()
    with pytest.raises(UserError, match="^data: resize must be crop, pad or stretch .* got none for 2 of 3 .*20 x 30"):
        read(tmp_path, square, odd, odd, image_size=8)


NAMES = ["a b.png", "two\nlines.png", 'it\'s "quoted".png', "жжж.png", "b'\udcff.png", "-x.png", "%s {}.png"]


def test_names_of_all_alphabets_are_read_and_named_in_one_line(tmp_path, caplog):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for index, name in enumerate(NAMES):
            Image.fromarray(np.roll(BYTES, index)).save(tmp_path / folder / name, "PNG")
    result = data.load(tmp_path)
    assert sum(map(len, (result.train, result.val, result.test))) == 2 * len(NAMES)
    for name in NAMES:
        (tmp_path / "b" / name).write_bytes(b"")
    Image.fromarray(BYTES).save(tmp_path / "b" / "good.png")
    Image.fromarray(BYTES.T).save(tmp_path / "b" / "good too.png")
    with pytest.raises(UserError, match="^data: every image must be readable, got 7 that are not") as error:
        data.load(tmp_path)
    assert "\n" not in str(error.value)
    with caplog.at_level("WARNING", "kr_fast"):
        _, _, splits = data.load_uncut(tmp_path, options=data.ReadOptions(skip_unreadable=True))
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == len(NAMES)
    assert not any("\n" in line for line in lines)
    assert splits["all"].labels.tolist() == [0] * 7 + [1] * 2
    assert np.array_equal(splits["all"].images[-1, ..., 0], BYTES)


def test_damaged_pixels_are_skipped_and_counted(tmp_path):
    """One that is seen by its header, one that is seen when it is decoded, of 8 bits and of 16."""
    for name in ("grey png", "16-bit png"):
        good = CASES[name][0]
        contents = [good, good[:20], good[:-40], good]
        pixels, notes = read(tmp_path, *contents, skip_unreadable=True)
        assert pixels.shape == (2, SIDE, SIDE, 1)
        assert np.array_equal(pixels[1], CASES[name][1])
        assert notes == ["left out as unreadable: 2 images"]
    with pytest.raises(UserError, match="^data: source must hold an image that can be read, got none of 2"):
        read(tmp_path, b"", b"", skip_unreadable=True)


def test_large_files_are_refused_by_their_headers(tmp_path):
    """A TIFF of 2 GiB (a file with a hole) and pictures of more pixels than are decoded, however small they become."""
    tiff = saved(Image.fromarray(BYTES), "TIFF")
    (at,) = struct.unpack("<I", tiff[4:8])
    changed = bytearray(tiff)
    for index in range(struct.unpack("<H", tiff[at : at + 2])[0]):
        entry = at + 2 + 12 * index
        if struct.unpack("<H", tiff[entry : entry + 2])[0] in (256, 257, 278):
            changed[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 46341)
    file = tmp_path / "large.tif"
    file.write_bytes(changed)
    os.truncate(file, 2 << 30)
    for image_size in (0, 64):
        with pytest.raises(UserError, match=r"^data: image must be readable, got .*large.tif \(its header claims"):
            image_files.read({"images": [file]}, LIMITS, data.ReadOptions(image_size=image_size))
    with pytest.raises(UserError, match="its header claims 10000 x 10000 pixels, more than 67 million"):
        read(tmp_path, png(10000, 10000, 8, 2, []), image_size=64)


def planes_of_16_bits():
    """A TIFF of 16-bit colour with PlanarConfiguration 2, whose planes Pillow reads as 8 bits: other pixels."""
    rows, at = DEEP.tobytes(), 8 + 2 + 9 * 12 + 4
    starts = [at + 12 * 2 + 6 + index * len(rows) for index in range(3)]
    lists = struct.pack("<3I3I3H", *starts, *[len(rows)] * 3, 16, 16, 16)
    tags = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, 3, at + 24), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 3, at), (277, 3, 1, 3), (279, 4, 3, at + 12), (284, 3, 1, 2)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + lists + 3 * rows


BOMB = png(50000, 50000, 8, 2, [])
BROKEN = {
    "text": (b"hello", "it holds no PNG, .* or DICOM image"),
    "empty": (b"", "it is empty"),
    "cut": (CASES["grey png"][0][:-30], "truncated|broken"),
    "cut header": (CASES["grey png"][0][:20], "."),
    "bomb": (BOMB, "its header claims more pixels than Pillow opens"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it holds no PNG"),
    "planes of 16 bits": (planes_of_16_bits(), "16-bit colour in separate planes"),
    "signed 8 bits": (saved(Image.fromarray(BYTES), "TIFF", tiffinfo={339: 2}), "signed 8-bit pixels"),
    "white is 0": (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), "whose white is 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_refused_in_one_line(tmp_path, name):
    content, why = BROKEN[name]
    with pytest.raises(
        UserError, match=rf"^data: image must be readable, got .*1.png \(.*({why}).*; --skip-un"
    ) as error:
        read(tmp_path, saved(Image.fromarray(BYTES), "PNG"), content)
    assert "\n" not in str(error.value)


def test_large_pictures_are_refused_before_one_is_decoded(tmp_path):
    """200 million claimed pixels without data: opened by Pillow, refused by their size."""
    with pytest.raises(UserError, match=r"^data: image size must be 8 to 224 px on both sides, got 10000 x 10000"):
        read(tmp_path, png(10000, 10000, 8, 2, []))


def test_what_is_no_file(tmp_path):
    for suffix in ("png", "jpg"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        (tmp_path / f"link.{suffix}").symlink_to("nothing")
        (tmp_path / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        for name, why in (("pipe", "no regular file"), ("link", "No such file"), ("loop", "symbolic links")):
            with pytest.raises(UserError, match=rf"^data: image must be readable, got .*{name}.{suffix} \(.*{why}"):
                image_files.read({"images": [tmp_path / f"{name}.{suffix}"]}, LIMITS)


def test_memory_is_asked_for_before_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "free_memory", lambda: 100)
    with pytest.raises(UserError, match=r"^data: all images together must fit the memory, got 2 images of 8 x 8 grey"):
        read(tmp_path, CASES["grey png"][0], CASES["grey png"][0])


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(CASES)), at=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path_factory, name, at, byte, cut):
    content = bytearray(CASES[name][0])
    place = min(int(at * len(content)), len(content) - 1)
    content[place] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.png"
    file.write_bytes(content[:place] if cut else content)
    refused = None
    try:
        image_files.read({"images": [file]}, LIMITS)
    except UserError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith("data: ")
        assert "\n" not in refused
