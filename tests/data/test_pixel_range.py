"""One scale for all splits, certain or refused: against float64, and the bytes that were encoded."""

import numpy as np
import pytest
from data_cases import read_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.data.pixel_range import to_uint8
from kr_fast.runtime.errors import UserError

INTEGERS = ["u1", "i2", "<u2", ">u2", "i4", ">i4", "u8", "i8"]
FLOATS = ["<f2", ">f2", "f4", ">f4", "f8", ">f8", "longdouble"]
ENCODINGS = [
    *((f"{dtype} in [0, 255]", lambda x, d=dtype: x.astype(d)) for dtype in INTEGERS + FLOATS),
    *((f"{dtype} in [0, 1]", lambda x, d=dtype: (x / 255).astype(d)) for dtype in FLOATS),
    *((f"{dtype} of 16 bits", lambda x, d=dtype: x.astype(d) * 257) for dtype in ("<u2", ">u2", "i4", "u8")),
    ("rounded up", lambda x: np.nextafter((x / 255).astype(np.float32), np.float32(2))),
    ("not native", lambda x: x / 255 * 1.0000000000000004),
]


@pytest.mark.parametrize("encode", [each for _, each in ENCODINGS], ids=[name for name, _ in ENCODINGS])
def test_what_was_encoded_comes_back(encode):
    """Every level in one split, and in the other dark ones alone: by themselves they would be on another scale."""
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    actual, notes, warnings = to_uint8({"train_images": encode(levels), "test_images": encode(levels[:1])})
    assert np.array_equal(actual["train_images"], levels)
    assert np.array_equal(actual["test_images"], levels[:1])
    assert actual["train_images"].dtype == np.uint8
    assert len(notes) == 1
    assert warnings == []


def test_bool_is_black_and_white():
    actual, notes, _ = to_uint8({"images": np.array([[True, False]])})
    assert actual["images"].tolist() == [[255, 0]]
    assert notes == ["bool pixels, times 255"]


@st.composite
def splits(draw):
    """Two splits, each of its own dtype, range and byte order."""
    parts = {}
    for name in ("train_images", "test_images"):
        dtype = np.dtype(draw(st.sampled_from([*INTEGERS, *FLOATS, "?", "i1", "f8"])))
        shape = (draw(st.integers(0, 3)), 2, 2, 1)
        ends = [0, 1, 2, 15, 16, 100, 128, 255, 256, 260, 300, 4095, 32767, 32768, 65535, 70000, 1.0000001, 1.03, 1.2]
        low = draw(st.sampled_from([0, 0, 0, -1, -0.02, -0.3, -2.1, -20, -1000]))
        high = draw(st.sampled_from(ends) | st.floats(0, 70000))
        values = np.random.default_rng(draw(st.integers(0, 99))).uniform(low, high, shape)
        values.flat[:2] = (low, high)[: min(2, values.size)]
        with np.errstate(all="ignore"):
            parts[name] = values.astype(dtype)
    return parts


@settings(deadline=None, max_examples=300)
@given(parts=splits())
def test_all_splits_by_one_value_of_white_or_refused_in_one_line(parts):
    held = {name: images.astype(np.float64) for name, images in parts.items() if images.size}
    result = read_or_refused(lambda: to_uint8(parts))
    if result is None:
        return
    actual, notes, _ = result
    assert {name: images.shape for name, images in actual.items()} == {name: x.shape for name, x in parts.items()}
    assert len(notes) == bool(held)
    if held:
        low, high = min(x.min() for x in held.values()), max(x.max() for x in held.values())
        fits = {
            white: all(
                np.array_equal(actual[name], np.clip(np.rint(x * (255 / white)), 0, 255)) for name, x in held.items()
            )
            for white in (1, 255, 65535)
            if -0.1 * white <= low and high <= 1.1 * white
        }
        assert any(fits.values()), notes
    bytes_alone = all(parts[name].dtype == np.uint8 for name in held)
    for name, x in held.items():  # what is not black stays so: of bytes alone the depth is known
        if x.max() > (1 if bytes_alone else 0):
            integers = all(parts[each].dtype.kind in "iu" for each in held)
            assert actual[name].max() >= (2 if integers else 15)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((0.0, 1.0), (0.0, 255.0), r"train must be on the scale of test, which lie in \[0, 255\]"),
        ((-1.0, 1.0), (-1.0, 1.0), r"\[-1, 1\] \(\(x \+ 1\) / 2 makes \[0, 1\] of \[-1, 1\]\)"),
        ((-2.1, 2.6), (0.0, 255.0), r"train must be on the scale of test"),
        ((-2.1, 2.6), (-2.1, 2.6), r"undo their standardisation"),
        ((0.0, 1.2), (0.0, 1.0), r"np.clip\(x, 0, 1\) if white is 1"),
        ((0.0, 16.0), (0.0, 16.0), r"divide them by the value of white"),
        ((0.0, 1 / 255), (0.0, 1 / 255), r"divided twice"),
        ((0.0, 65535.0), (0.0, 1.0), r"train must be floats in \[0, 1\] or \[0, 255\], got float64 in \[0, 65535\]"),
        ((0, 4095), (0, 4095), r"train must be integers .* white = 4095 for 12 bit"),
        ((0, 70000), (0, 9), r"train must be integers in \[0, 255\] or of full 16 bits, got int64 in \[0, 70000\]"),
        ((0, 65535), (0, 255), r"test must be on the scale of train, which lie in \[0, 65535\]"),
        ((-1024, 3071), (0, 255), r"choose a window"),
        ((0, 1), (0, 1), r"hold more values than 0 and 1, unless they are bool, .*multiply them by 255"),
        ((0, 255), (0, 1), r"test must be on the scale of train"),
        ((0.0, np.nan), (0.0, 1.0), r"train must hold finite pixels, got 3 that are not"),
        ((0.0, 1.0), (-np.inf, 1.0), r"test must hold finite pixels, got 3 that are not"),
    ],
)
def test_what_is_not_certain_is_refused_with_the_mend(train, test, words):
    with pytest.raises(UserError, match=f"^data: .*{words}") as error:
        to_uint8({"train": np.array([train] * 3), "test": np.array([test] * 3)})
    assert "\n" not in str(error.value)


def test_overshoot_is_clipped_and_counted_and_centred_pixels_are_not_overshoot():
    ramp = np.linspace(-0.02, 1.03, 106)
    actual, notes, _ = to_uint8({"images": ramp})
    assert np.array_equal(actual["images"], np.clip(np.rint(ramp * 255), 0, 255))
    beyond = int(((ramp < 0) | (ramp > 1)).sum())
    words = f"{beyond} of 106 pixels beyond [0, 1] clipped (the lowest -0.02, the highest 1.03)"
    assert notes == [f"float64 pixels in [0, 1], times 255, {words}"]
    actual, notes, _ = to_uint8({"images": ramp * 255})
    assert np.array_equal(actual["images"], np.clip(np.rint(ramp * 255), 0, 255))
    assert f"{beyond} of 106 pixels beyond [0, 255] clipped" in notes[0]
    with pytest.raises(UserError, match=r"images must lie in \[0, 1\], got 5[0-9] of 110 pixels beyond it"):
        to_uint8({"images": np.linspace(-0.09, 0.09, 110)})


def test_little_contrast_is_told():
    _, _, warnings = to_uint8({"images": np.arange(17, dtype=np.uint8)})
    assert warnings == ["pixels span only [0, 16] of [0, 255]: if 16 is white, divide by it first"]
    _, _, warnings = to_uint8({"images": np.linspace(0.95, 1, 5)})
    assert warnings == ["pixels span only [0.95, 1] of [0, 1]: their contrast is low"]


def test_zeros_and_ones_that_are_not_bool_are_named():
    images = np.array([0, 1])
    with pytest.raises(UserError, match=r"^data: test must hold more values .*, got uint8 in \[0, 1\] \(multiply"):
        to_uint8({"train": images.astype(bool), "test": images.astype(np.uint8)})


def test_other_dtypes_are_refused():
    for images in (np.zeros(3, complex), np.array(["a"]), np.zeros(3, "M8[s]")):
        with pytest.raises(UserError, match=r"^data: images must be integers in \[0, 255\], or floats"):
            to_uint8({"images": images})
