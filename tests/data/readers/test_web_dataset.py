"""WebDataset shards, as the package webdataset writes them, and every way in which one can be wrong."""

import io
import tarfile

import numpy as np
import pytest
import torch
from data_cases import arrays, write_npz
from PIL import Image

from kr_fast import data
from kr_fast.runtime.errors import UserError


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_shards_of_the_package_are_the_same_set(tmp_path):
    """Several shards of a split; images as png and as arrays, beside members that are not read."""
    import webdataset

    held = arrays()
    expected = data.load(write_npz(tmp_path / "set.npz"))
    for form in ("png", "npy"):
        folder = tmp_path / form
        folder.mkdir()
        for which in ("train", "val", "test"):
            with webdataset.ShardWriter(str(folder / f"{which}-%06d.tar"), maxcount=15, verbose=0) as writer:
                for row, image in enumerate(held[f"{which}_images"]):
                    pixels = png(image[..., 0]) if form == "png" else image
                    label = int(held[f"{which}_labels"][row, 0])
                    writer.write({"__key__": f"a/{row:06d}", form: pixels, "cls": label, "json": {"id": row}})
        actual = data.load(folder)
        assert actual.fingerprint == expected.fingerprint
        assert actual.class_names == tuple("0123")
        assert actual.notes[:2] == ("uint8 pixels in [0, 255]", "not read: 72 members of shards (.json)")
        assert torch.equal(actual.val.images, expected.val.images)
    name, _, splits = data.load_uncut(tmp_path / "npy" / "train-000001.tar")
    assert (name, list(splits)) == ("train-000001", ["all"])
    assert np.array_equal(splits["all"].images, held["train_images"][15:30])


def pair(key, value=9, label=b"a", size=8):
    return [(f"{key}.png", png(np.full((size, size), value, np.uint8))), (f"{key}.cls", label)]


GOOD = [*pair("0", 1), *pair("1", 2, b"b"), *pair("2", 3), *pair("3", 4, b"b")]


def test_names_and_members_that_are_no_samples(tmp_path):
    odd = [*pair("two words", 1), *pair("line\nbreak", 2, b"b\n"), *pair("图/像", 3), *pair("q'\"", 4, b" b ")]
    odd += [("._0.png", b""), ("README", b"x"), ("0.seg.png", b"mask")]
    with pytest.raises(
        UserError, match="every sample must hold an image and a class.*got 1 sample of 5 .*: x.tar: 0 with"
    ):
        data.load(write_tar(tmp_path / "x.tar", odd))
    _, classes, splits = data.load_uncut(write_tar(tmp_path / "x.tar", odd[:-1]))
    assert classes == ("a", "b")
    assert splits["all"].images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert splits["all"].labels.tolist() == [0, 1, 0, 1]
    options = data.ReadOptions(skip_unreadable=True)
    skipped = data.read(write_tar(tmp_path / "x.tar", odd), options=options).content
    assert len(skipped.parts["all"].labels) == 4
    assert skipped.notes[-2:] == [
        "left out: 1 sample without an image or a class",
        "not read: 2 members of shards (hidden, other)",
    ]


def test_classes_are_numbers_with_and_without_zeros_before_them(tmp_path):
    """As ``kr-fast synthesize`` writes those of eleven classes."""
    labels = [b"00", b"01", b"2", b"10", b"02"]
    members = [each for key, label in enumerate(labels) for each in pair(key, label=label)]
    _, classes, splits = data.load_uncut(write_tar(tmp_path / "x.tar", members))
    assert classes == ("0", "1", "2", "10")
    assert splits["all"].labels.tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([*GOOD, ("4.png", b"")], "every sample must .*, got 1 sample of 5 .*: x.tar: 4 without .cls; --skip"),
        ([*GOOD, ("4.cls", b"a")], "every sample must .*, got 1 sample of 5 .*: x.tar: 4 without an image; --skip"),
        ([("4.txt", b"a")], "every sample must hold an image and a class, .*, got 1 sample of 1 .* image$"),
        ([*GOOD, ("0.jpg", b"")], "source must have one image in each sample, got x.tar: 0 with .png, .jpg"),
        ([*GOOD, *GOOD[:1]], "source must hold each member once, got 0.png again in"),
        ([*GOOD, ("4.npy", npy(np.zeros((8, 8)))), ("4.cls", b"a")], "source must hold arrays or encoded images"),
        ([*GOOD, ("4.png", b"no"), ("4.cls", b"a")], "image must be readable, got x.tar: 4.png .it holds no"),
        ([*GOOD, *pair("4", size=9)], "every image must have one size .*x.tar: 4.png"),
        ([*GOOD, ("4.png", GOOD[0][1]), ("4.cls", b"")], ".cls of the samples must hold a class in every row"),
        ([*GOOD, *pair("4", label=b"\xff")], "class must be text in UTF-8, got x.tar: 4.cls"),
        ([*GOOD, *pair("4", label=b"a,b")], ".cls of the samples must hold one label an image .*, got a,b"),
        ([*GOOD, *pair("4", label=b"x" * 5000)], "class must be text of at most 4096 bytes, got 5000 in x.tar: 4.cls"),
        ([("0.npy", b"no"), ("0.cls", b"a")], "source, x.tar: 0.npy, must be a readable .npy array, got a damaged one"),
        (
            [("0.npy", npy(np.zeros((8, 8)))), ("0.cls", b"a"), ("1.npy", npy(np.zeros((8, 9)))), ("1.cls", b"a")],
            r"arrays of samples must have one shape .*, got float64 \[8, 9\] in x.tar: 1.npy beside float64 \[8, 8\]",
        ),
        ([], "source must hold at least one image, got none in "),
    ],
)
def test_bad_shards(tmp_path, members, words):
    write_tar(tmp_path / "set" / "x.tar", members)
    with pytest.raises(UserError, match=f"^data: {words}") as error:
        data.load(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_a_tar_file_beside_linked_class_folders_is_no_data_set(tmp_path):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(png(np.full((8, 8), ord(name), np.uint8)))
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(tmp_path / "images" / name)
    write_tar(tmp_path / "set" / "download.tar", GOOD)
    assert data.load_uncut(tmp_path / "set")[2]["all"].images[:, 0, 0, 0].tolist() == [97, 98]


def test_damaged_shards_are_one_line(tmp_path):
    """Cut anywhere, compressed, empty, or another kind of file."""
    whole = write_tar(tmp_path / "x.tar", GOOD).read_bytes()
    for content in (whole[:700], whole[:1100], b"", b"\x1f\x8b" + whole, b"x" * 2000):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(UserError, match="^data: (source|every sample) must hold .*") as error:
            data.load(tmp_path / "x.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="label_column must be left out for WebDataset shards"):
        data.load(tmp_path / "x.tar", options=data.ReadOptions(label_column="x"))
