"""DICOM as its own windows show it, against the formulas of PS3.3 C.11 in float64; and nothing of a person."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kr_fast import data
from kr_fast.data import image_files
from kr_fast.runtime.errors import UserError

pydicom = pytest.importorskip("pydicom")

SIDE = 9  # odd: an odd number of bytes of 8-bit pixels is padded
PERSON = "Geheim^Person"
draw = np.random.default_rng(0)
DEEP = draw.integers(0, 4096, (SIDE, SIDE)).astype(np.uint16)
SIGNED = draw.integers(-1024, 1024, (SIDE, SIDE)).astype(np.int16)


def dicom(pixels, photometric="MONOCHROME2", syntax="ExplicitVRLittleEndian", stored=None, **elements):
    """The bytes of a file of ``pixels`` and a person's name in three places."""
    content = pydicom.Dataset()
    content.PatientName = content.PatientID = content.ImageComments = PERSON
    content.Rows, content.Columns = pixels.shape[:2]
    content.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        content.PlanarConfiguration = 0
    content.PhotometricInterpretation = photometric
    content.BitsAllocated = 8 * pixels.dtype.itemsize
    content.BitsStored = stored or content.BitsAllocated
    content.HighBit = content.BitsStored - 1
    content.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(content, name, value)
    content.SOPClassUID, content.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    order = ">" if syntax == "ExplicitVRBigEndian" else "<"
    content.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() + b"\0" * (pixels.nbytes % 2)
    content["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    buffer = io.BytesIO()
    content.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read(tmp_path, *contents, **options):
    files = []
    for index, content in enumerate(contents):
        files.append(tmp_path / f"{index}.dcm")
        files[-1].write_bytes(content)
    result = image_files.read({"images": files}, None, data.ReadOptions(**options))
    return result.pixels["images"], result.notes[1:]


def levels(y):
    return np.rint(np.clip(y, 0, 255)).astype(np.uint8)


def by_percentiles(values):
    low, high = np.percentile(values, (0.5, 99.5), method="inverted_cdf")
    return levels((values.astype(np.float64) - low) * 255 / (high - low))


def linear(values, centre, width):
    return levels(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255)


TABLE = pydicom.Dataset()
TABLE.LUTDescriptor, TABLE.LUTData = [4096, 0, 12], np.arange(4096)[::-1].astype("<u2").tobytes()
TABLE["LUTDescriptor"].VR, TABLE["LUTData"].VR = "US", "OW"
HU = SIGNED.astype(np.float64)
PADDED = DEEP.copy()
PADDED[:4] = 60000
OWN, SHARE = "the file's own window applied to 1 image of DICOM", "the image's own window"
CASES = {
    "window": (dicom(DEEP, WindowCenter=2000, WindowWidth=1500), linear(DEEP, 2000.0, 1500), OWN),
    "first of two": (dicom(DEEP, WindowCenter=[900, 5], WindowWidth=[800, 9]), linear(DEEP, 900.0, 800), OWN),
    "width 1": (dicom(DEEP, WindowCenter=2000, WindowWidth=1), levels(255.0 * (DEEP > 1999.5)), OWN),
    "exact": (
        dicom(DEEP, WindowCenter=2000, WindowWidth=1500, VOILUTFunction="LINEAR_EXACT"),
        levels(((DEEP - 2000.0) / 1500 + 0.5) * 255), OWN),
    "sigmoid": (
        dicom(DEEP, WindowCenter=2000, WindowWidth=1500, VOILUTFunction="SIGMOID"),
        levels(255 / (1 + np.exp(-4 * (DEEP - 2000.0) / 1500))), OWN),
    "voi lut": (dicom(DEEP, VOILUTSequence=[TABLE]), levels((4095.0 - DEEP) * 255 / 4095), OWN),
    "rescaled": (
        dicom(SIGNED, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=40, WindowWidth=400),
        linear(HU * 2 - 100, 40.0, 400), OWN),
    "no window": (dicom(SIGNED, RescaleSlope=2, RescaleIntercept=-100), by_percentiles(SIGNED), SHARE),
    "padding": (
        dicom(PADDED, PixelPaddingValue=60000),
        levels((PADDED - np.percentile(DEEP[4:], 0.5, method="inverted_cdf") * 1.0) * 255
               / np.ptp(np.percentile(DEEP[4:], (0.5, 99.5), method="inverted_cdf"))), SHARE),
    "bad window": (dicom(DEEP, WindowCenter=2000, WindowWidth=0), by_percentiles(DEEP), SHARE),
    "monochrome 1": (
        dicom(DEEP, "MONOCHROME1", WindowCenter=2000, WindowWidth=1500),
        levels(255 - np.clip(((DEEP - 1999.5) / 1499 + 0.5) * 255, 0, 255)), OWN),
    "8 bit": (dicom(DEEP.astype(np.uint8), WindowCenter=128, WindowWidth=256), DEEP.astype(np.uint8), OWN),
    "overlay in high bits": (
        dicom(DEEP | 0xF000, stored=12, WindowCenter=2000, WindowWidth=1500), linear(DEEP, 2000.0, 1500), OWN),
    "sign in bit 11": (
        dicom(SIGNED & 0x0FFF, stored=12, WindowCenter=0, WindowWidth=2048), linear(HU, 0.0, 2048), OWN),
    "big-endian": (
        dicom(DEEP, syntax="ExplicitVRBigEndian", WindowCenter=2000, WindowWidth=1500),
        linear(DEEP, 2000.0, 1500), OWN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_grey_is_shown_as_the_standard_says(tmp_path, name):
    content, expected, note = CASES[name]
    pixels, notes = read(tmp_path, content)
    assert pixels.shape == (1, SIDE, SIDE, 1)
    assert np.array_equal(pixels[0, ..., 0], expected)
    assert notes[0].startswith(note)
    assert ("1 image of DICOM inverted (MONOCHROME1)" in notes) == (name == "monochrome 1")


def test_colour_frames_overlays_and_compression(tmp_path):
    colour = draw.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    assert np.array_equal(read(tmp_path, dicom(colour, "RGB"))[0][0], colour)
    tables = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in ("Red", "Green", "Blue")}
    tables |= {
        f"{name}PaletteColorLookupTableData": bytes((np.arange(256) * factor % 256).astype(np.uint8))
        for name, factor in (("Red", 1), ("Green", 3), ("Blue", 7))
    }
    index = colour[..., 0]
    expected = np.stack([(index.astype(int) * factor % 256) for factor in (1, 3, 7)], -1)
    assert np.array_equal(read(tmp_path, dicom(index, "PALETTE COLOR", **tables))[0][0], expected)
    file = pydicom.dcmread(io.BytesIO(CASES["window"][0]))
    file.NumberOfFrames, file.PixelData = 2, file.PixelData * 2
    file.add_new(0x60000010, "US", SIDE), file.add_new(0x60003000, "OW", b"\xff" * 16)
    file.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    file.save_as(buffer)
    pixels, notes = read(tmp_path, buffer.getvalue())
    assert np.array_equal(pixels[0, ..., 0], CASES["window"][1])
    assert notes == ["the first frame alone read of 1 image", OWN, "overlays of 1 image not read"]


def test_dicom_beside_other_files_of_other_sizes(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 200, 99)).save(buffer, "PNG")
    pixels, notes = read(tmp_path, CASES["window"][0], buffer.getvalue(), image_size=SIDE, resize="crop")
    assert np.array_equal(pixels[0], np.repeat(CASES["window"][1][..., None], 3, 2))
    assert (pixels[1] == (9, 200, 99)).all()
    assert "1 image of grey read as RGB" in notes


REFUSED = {
    "16-bit colour": (dicom(np.stack([DEEP] * 3, -1), "RGB"), "more than 8 bits per colour"),
    "no image": (dicom(DEEP, Rows=0), "it is DICOM without Rows, no image"),
    "hsv": (dicom(DEEP.astype(np.uint8), "HSV"), "photometric interpretation is none of those"),
    "cut": (CASES["window"][0][:-9], "."),
    "cut header": (CASES["window"][0][:300], "."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_dicom_that_is_refused_in_one_line_without_a_word_of_the_file(tmp_path, name):
    content, why = REFUSED[name]
    with pytest.raises(UserError, match=rf"^data: image must be readable, got .*0.dcm \(.*{why}") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
    assert "Geheim" not in str(error.value)


@settings(max_examples=60)
@given(
    name=st.sampled_from(["window", "16-bit colour"]),
    steps=st.lists(
        st.tuples(
            st.integers(128, 900),
            st.integers(0, 4),
            st.binary(max_size=4) | st.sampled_from([b"DS", b"SQ", b"\xff" * 3]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_dicom_is_read_or_one_line_without_a_word_of_the_file(tmp_path_factory, name, steps):
    content = bytearray(CASES[name][0] if name in CASES else REFUSED[name][0])
    for at, count, piece in steps:
        content[at : at + count] = piece
    text = ""
    try:
        read(tmp_path_factory.getbasetemp(), bytes(content))
    except UserError as error:
        text = str(error)
    assert "\n" not in text
    assert "Geheim" not in text
    assert "b'" not in text


def test_no_word_is_quoted_of_elements_that_pydicom_refuses(tmp_path):
    """A name where a number belongs: pydicom's error holds its bytes."""
    content = CASES["window"][0].replace(b"US\x02\x00" + bytes([SIDE, 0]), b"US\x03\x00" + PERSON.encode()[:3])
    assert content != CASES["window"][0]
    with pytest.raises(UserError, match="it is damaged DICOM, of which pydicom raises [A-Za-z]+\\)") as error:
        read(tmp_path, content)
    assert "Geh" not in str(error.value)


def test_compressed_pixels_that_no_package_decodes(tmp_path):
    file = pydicom.dcmread(io.BytesIO(CASES["window"][0]))
    file.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
    file.PixelData = pydicom.encaps.encapsulate([b"\0" * 10])
    file["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    file.save_as(buffer)
    with pytest.raises(
        UserError, match=r"^data: image must be readable, .*pydicom does not decode High-Throughput"
    ) as e:
        read(tmp_path, buffer.getvalue())
    assert "\n" not in str(e.value)


def test_no_word_of_a_person_leaves_the_files(tmp_path, caplog):
    """Files with and without a suffix; DICOMDIR is none. All that loading returns and says is searched."""
    for index, name in enumerate("aabbabab"):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True, exist_ok=True)
        content = dicom(np.roll(DEEP, index), WindowCenter=2000, WindowWidth=1500)
        assert PERSON.encode() in content
        (folder / (f"{index}.dcm" if index % 2 else f"1.2.840.{index}")).write_bytes(content)
    (tmp_path / "set" / "DICOMDIR").write_bytes(content)
    (tmp_path / "set" / "a" / "bad.dcm").write_bytes(content[:400])
    with caplog.at_level("DEBUG"):
        result = data.load(tmp_path / "set", options=data.ReadOptions(skip_unreadable=True))
    splits = (result.train, result.val, result.test)
    assert sum(map(len, splits)) == 8
    said = repr(result) + str(result.notes) + str(result.class_names) + caplog.text
    assert "applied to 8 images of DICOM" in said
    assert "Geheim" not in said
    assert not any(b"Geheim" in split.images.numpy().tobytes() for split in splits)
