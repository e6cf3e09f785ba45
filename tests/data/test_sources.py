"""Every source that a run reads, and every way in which one can be wrong."""

import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import arrays, write_npz
from PIL import Image

from kr_fast import data
from kr_fast.data.splits import Part, SourceContent, cut
from kr_fast.runtime.errors import UserError

REAL = Path(os.environ.get("KR_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def write_folder(root, counts, size=(9, 8), mode="L"):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = 10 * index if mode == "L" else (10 * index, 0, 5)
            Image.new(mode, size, colour).save(root / name / f"{index:02d}.png")
    return root


def test_digits_are_split_by_class_without_overlap():
    result = data.load("digits")
    assert result.image_shape == (8, 8, 1)
    assert result.class_names == tuple("0123456789")
    splits = [result.train, result.val, result.test]
    assert sum(map(len, splits)) == 1797
    assert [round(len(s) / 1797, 2) for s in splits] == [0.57, 0.1, 0.33]
    for split in splits:
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert float(share.min()) > 0.085
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.max() == 255
    again, other = data.load("digits"), data.load("digits", seed=1)
    assert torch.equal(again.train.images, result.train.images)
    assert not torch.equal(other.train.labels, result.train.labels)


def test_folder_of_classes(tmp_path):
    write_folder(tmp_path / "set", {"cat": 12, "dog": 30})
    result = data.load(tmp_path / "set")
    assert result.class_names == ("cat", "dog")
    assert result.image_shape == (8, 9, 1)
    assert sum(map(len, (result.train, result.val, result.test))) == 42
    assert all(set(split.labels.tolist()) == {0, 1} for split in (result.train, result.val, result.test))


def test_folder_with_its_own_splits_in_colour(tmp_path):
    for which, count in (("train", 6), ("val", 2), ("test", 3)):
        write_folder(tmp_path / "set" / which, {"a": count, "b": 1}, mode="RGB")
    result = data.load(tmp_path / "set")
    assert (len(result.train), len(result.val), len(result.test)) == (7, 3, 4)
    assert result.image_shape == (8, 9, 3)
    assert result.train.images[1, 0, 0].tolist() == [10, 0, 5]


def test_three_images_of_a_class_are_one_in_each_split():
    for count in (3, 2):
        result = SourceContent(
            {"all": Part(np.arange(2 * count, dtype=np.uint8), np.arange(2 * count) % 2)}, ("a", "b")
        )
        if count == 3:
            cut(result, data.VAL_FRACTION, data.TEST_FRACTION, seed=0)
            assert [result.parts[which].labels.tolist() for which in ("train", "val", "test")] == [[0, 1]] * 3
            assert sorted(np.concatenate([part.images for part in result.parts.values()])) == list(range(6))
        else:
            with pytest.raises(UserError, match=r"data: val split must hold .*, got 0 \(no class has one for"):
                cut(result, data.VAL_FRACTION, data.TEST_FRACTION, seed=0)


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write_folder(tmp_path / "set", {"a": 4, "b": 4}) / "a")
    assert data.load("~/set").name == data.load("..").name == "set"
    with pytest.raises(FileNotFoundError, match="got ~nobody-here/set, which is not there"):
        data.load("~nobody-here/set")


def test_rare_class_keeps_a_training_image(tmp_path):
    labels = np.zeros(40, np.int64)
    labels[0], labels[1:3], labels[3:5] = 1, 2, 3
    result = data.load(write_npz(tmp_path / "set.npz", train_labels=labels, val_images=None, val_labels=None))
    assert (torch.bincount(result.train.labels) > 0).all()


def test_unreadable_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: source must be digits, a .npz, .parquet or .tar file, or a"):
        data.load(tmp_path / "absent.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match="data: source must be a readable .npz file"):
        data.load(tmp_path / "broken.npz")
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="data: source must be a readable .npz file"):
        data.load(tmp_path / "short.npz")
    (tmp_path / "set.txt").write_text("x")
    with pytest.raises(
        UserError, match="data: source must be digits, a .npz, .parquet or .tar file, or a folder of images"
    ):
        data.load(tmp_path / "set.txt")
    for name, words in (
        ("set.zip", "unpack it"),
        ("labels.CSV", "as --table"),
        ("x.npy", "np.savez"),
        ("0.tif", "folder"),
    ):
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=rf"data: source must be digits, .*{name} \(.*{words}"):
            data.load(tmp_path / name)
    for bad in (0, 1, float("nan"), "0.5"):
        with pytest.raises(UserError, match="data: val_fraction must be in"):
            data.load("digits", val_fraction=bad)
    for bad, words in (
        ("", "be digits"),
        (None, "be digits"),
        ("a\0b", "be a readable path"),
        ("x" * 5000, "be a read"),
    ):
        with pytest.raises(UserError, match=f"^data: source must {words}"):
            data.load(bad)


def test_bad_folders(tmp_path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="data: source must hold images as class/image.png"):
        data.load(tmp_path / "empty")
    odd = write_folder(tmp_path / "odd", {"a": 3, "b": 3})
    Image.new("L", (10, 10)).save(odd / "b" / "zz.png")
    with pytest.raises(
        UserError,
        match=r"every image must have one size and one mode, got 6 of 8 x 9 grey, 1 of 10 x 10 grey .b/zz.png",
    ):
        data.load(odd)
    (odd / "b" / "zz.png").write_bytes(b"not a png")
    with pytest.raises(UserError, match=r"data: image must be readable, got .*zz.png"):
        data.load(odd)
    one = write_folder(tmp_path / "one", {"a": 9})
    with pytest.raises(UserError, match="number of classes must be 2 to 1000, got 1"):
        data.load(one)
    gap = write_folder(tmp_path / "gap", {"a": 9, "b": 9})
    (gap / "c").mkdir()
    with pytest.raises(UserError, match="every class must have a training image, got none of c"):
        data.load(gap)
    split = tmp_path / "split"
    write_folder(split / "train", {"a": 3, "b": 3})
    write_folder(split / "test", {"a": 3, "x": 3})
    with pytest.raises(UserError, match="test class folders must be among those of .*, got x"):
        data.load(split)


def test_train_and_val_alone_cut_their_test_and_say_so(tmp_path, caplog):
    write_folder(tmp_path / "set" / "train", {"a": 9, "b": 9})
    write_folder(tmp_path / "set" / "val", {"a": 2, "b": 2})
    with caplog.at_level(logging.INFO, "kr_fast"):
        result = data.load(tmp_path / "set")
    assert (len(result.train), len(result.val), len(result.test)) == (12, 4, 6)
    assert "no test split: 0.333 of the training images are taken for it" in result.notes
    assert "data: 22 images of 2 classes (train 12, val 4, test 6), 8 x 9 x 1; uint8 pixels in [0, 80]" in caplog.text


def test_images_on_both_sides_are_counted(tmp_path, caplog):
    held = arrays()
    held["test_images"][3:8] = held["train_images"][10:15]
    held["val_images"][:2] = held["train_images"][0]
    result = data.load(write_npz(tmp_path / "set.npz", **held))
    assert result.notes[2:] == (
        "2 of 12 val images are byte-equal to train images",
        "5 of 20 test images are byte-equal to train images",
    )
    assert "data: 5 of 20 test images are byte-equal" in caplog.text
    held["train_images"][:21] = 9
    warned = data.load(write_npz(tmp_path / "set.npz", **held)).notes[2]
    assert warned == "21 of 40 training images are one and the same"


def test_shapes_in_alpha_are_seen(tmp_path):
    for index in range(12):
        shape = np.zeros((8, 8, 4), np.uint8)
        shape[index % 8, : 4 + index % 3, 3] = 255
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(shape).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    result = data.load(tmp_path)
    assert result.train.images.unique().tolist() == [0, 255]
    assert "alpha composed on white in 12 images" in result.notes


def test_an_output_folder_among_the_images_is_no_class(tmp_path):
    write_folder(tmp_path, {"a": 9, "b": 9})
    before = data.load(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "journal.json"):
        (tmp_path / "run" / name).write_text("{}")
    after = data.load(tmp_path)
    assert after.class_names == before.class_names
    assert torch.equal(after.train.images, before.train.images)
    assert "not read: 1 folder written by kr-fast" in after.notes


def test_to_float_is_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    result = data.to_float(images)
    assert result.shape == (2, 3, 4, 4)
    assert result.dtype == torch.float32
    assert result[0].unique().tolist() == [-1.0]
    assert result[1].unique().tolist() == [1.0]


@pytest.mark.skipif(not (REAL / "retinamnist.npz").exists(), reason="needs the optional folder of real images")
def test_a_real_medical_set():
    result = data.load(REAL / "retinamnist.npz")
    assert result.image_shape == (28, 28, 3)
    assert result.num_classes == 5
    assert (len(result.train), len(result.val), len(result.test)) == (1080, 120, 400)


def test_uncut_is_the_source_in_its_order(tmp_path):
    """Member lists are indices: nothing may be cut or mixed. 1,797 digits, and an .npz without a validation split."""
    from sklearn.datasets import load_digits

    name, classes, splits = data.load_uncut("digits")
    assert (name, len(classes), list(splits)) == ("digits", 10, ["all"])
    assert splits["all"].labels.tolist() == load_digits().target.tolist()
    images = np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8)
    parts = {"train_images": images[:30], "train_labels": np.arange(30) % 3, "test_images": images[30:]}
    np.savez(tmp_path / "x.npz", **parts, test_labels=np.arange(10) % 3)
    splits = data.load_uncut(tmp_path / "x.npz")[2]
    assert list(splits) == ["train", "test"]
    assert np.array_equal(splits["train"].images[..., 0].numpy(), images[:30])
    np.savez(tmp_path / "y.npz", **{**parts, "test_images": images[30:, :7]}, test_labels=np.arange(10) % 3)
    with pytest.raises(ValueError, match="test images must have the shape of the first split"):
        data.load_uncut(tmp_path / "y.npz")


def test_groups_go_with_their_images():
    """Each image holds its own number, and its group is that number modulo 7: also after a cut."""
    numbers = np.arange(60, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (60, 8, 8, 1)).copy()
    part = Part(images, np.arange(60) % 2, np.arange(60) % 7)
    result = data.Source("set", SourceContent({"all": part}, ("a", "b"))).dataset(seed=3)
    for split in (result.train, result.val, result.test):
        assert split.groups.tolist() == [number % 7 for number in split.images[:, 0, 0, 0].tolist()]
    bare = dataclasses.replace(result, train=data.Split(result.train.images, result.train.labels))
    assert bare.fingerprint != result.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "file"}, "image_column must be left out for digits, got 'file'"),
        ({"table": "t.csv"}, "table must be left out for digits, got 't.csv'"),
        ({"resize": "crop"}, "resize must be left out without image_size, got crop"),
        ({"resize": "fit", "image_size": 8}, "resize must be crop, pad or stretch, got fit"),
        ({"image_size": 300}, r"image_size must be in \[0, 224\], got 300"),
    ],
)
def test_options_that_do_nothing(options, words):
    with pytest.raises(UserError, match=f"^data: {words}"):
        data.load("digits", options=data.ReadOptions(**options))
