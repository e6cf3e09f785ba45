"""Every source that a run reads, and every way in which one can be wrong."""

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast import data
from kr_fast.runtime.errors import UserError

REAL = Path(os.environ.get("KR_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def arrays(train=40, val=12, test=20, shape=(8, 8, 1), classes=4, seed=0):
    draw = np.random.default_rng(seed)
    found = {}
    for which, count in (("train", train), ("val", val), ("test", test)):
        if count:
            found[f"{which}_images"] = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
            found[f"{which}_labels"] = np.arange(count)[:, None] % classes
    return found


def write_npz(path, **changes):
    found = arrays() | changes
    np.savez(path, **{key: value for key, value in found.items() if value is not None})
    return path


def write_folder(root, counts, size=(9, 8), mode="L"):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            colour = 10 * index if mode == "L" else (10 * index, 0, 5)
            Image.new(mode, size, colour).save(root / name / f"{index:02d}.png")
    return root


def test_digits_are_split_by_class_without_overlap():
    found = data.load("digits")
    assert found.image_shape == (8, 8, 1)
    assert found.class_names == tuple("0123456789")
    splits = [found.train, found.val, found.test]
    assert sum(map(len, splits)) == 1797
    assert [round(len(s) / 1797, 2) for s in splits] == [0.57, 0.1, 0.33]
    for split in splits:
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert float(share.min()) > 0.085
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.max() == 255
    again, other = data.load("digits"), data.load("digits", seed=1)
    assert torch.equal(again.train.images, found.train.images)
    assert not torch.equal(other.train.labels, found.train.labels)


def test_npz_keeps_its_own_splits(tmp_path):
    wanted = arrays()
    found = data.load(write_npz(tmp_path / "set.npz"))
    assert found.name == "set"
    assert (len(found.train), len(found.val), len(found.test)) == (40, 12, 20)
    assert np.array_equal(found.train.images.numpy(), wanted["train_images"])
    assert np.array_equal(found.test.labels.numpy(), wanted["test_labels"][:, 0])


def test_npz_without_val_is_cut(tmp_path):
    path = write_npz(tmp_path / "set.npz", val_images=None, val_labels=None)
    found = data.load(path, val_fraction=0.2)
    assert (len(found.train), len(found.val), len(found.test)) == (32, 8, 20)
    assert torch.bincount(found.val.labels).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        (np.full((40, 8, 8), 7, np.uint8), 7),  # no channel axis
        (np.full((40, 8, 8, 1), 0.5, np.float32), 128),  # in [0, 1]
        (np.full((40, 8, 8, 1), 200.4, np.float64), 200),  # in [0, 255]
    ],
)
def test_pixels_of_other_kinds(tmp_path, images, wanted):
    images[0] = 0
    scale = 255.0 if images.max() < 1 else 1
    others = {
        f"{which}_images": (arrays()[f"{which}_images"] / scale).astype(images.dtype) for which in ("val", "test")
    }
    found = data.load(write_npz(tmp_path / "set.npz", train_images=images, **others))
    assert found.train.images.unique().tolist() == [0, wanted]
    assert np.array_equal(found.test.images, arrays()["test_images"])


def test_folder_of_classes(tmp_path):
    write_folder(tmp_path / "set", {"cat": 12, "dog": 30})
    found = data.load(tmp_path / "set")
    assert found.class_names == ("cat", "dog")
    assert found.image_shape == (8, 9, 1)
    assert sum(map(len, (found.train, found.val, found.test))) == 42
    assert all(set(split.labels.tolist()) == {0, 1} for split in (found.train, found.val, found.test))


def test_folder_with_its_own_splits_in_colour(tmp_path):
    for which, count in (("train", 6), ("val", 2), ("test", 3)):
        write_folder(tmp_path / "set" / which, {"a": count, "b": 1}, mode="RGB")
    found = data.load(tmp_path / "set")
    assert (len(found.train), len(found.val), len(found.test)) == (7, 3, 4)
    assert found.image_shape == (8, 9, 3)
    assert found.train.images[1, 0, 0].tolist() == [10, 0, 5]


def test_rare_class_keeps_a_training_image(tmp_path):
    labels = np.zeros(40, np.int64)
    labels[0], labels[1:3], labels[3:5] = 1, 2, 3
    found = data.load(write_npz(tmp_path / "set.npz", train_labels=labels, val_images=None, val_labels=None))
    assert (torch.bincount(found.train.labels) > 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": None}, "source must hold the keys .*, got .* without train_labels"),
        ({"val_labels": None}, "source must hold val_labels beside val_images"),
        ({"train_labels": np.arange(40) - 1}, r"train_labels must lie in \[0, 1000\), got \[-1, 38\]"),
        ({"train_labels": np.arange(40) * 30}, r"train_labels must lie in \[0, 1000\), got \[0, 1170\]"),
        ({"train_labels": np.zeros(39, int)}, r"train_labels must have shape \[40\] or \[40, 1\] .*, got \[39\]"),
        ({"train_labels": np.zeros((40, 14), int)}, r"train_labels must have shape .*, got \[40, 14\]"),
        ({"train_labels": np.zeros(40)}, "train_labels must be integers, got float64 .*x.astype"),
        ({"train_labels": np.eye(4)[np.arange(40) % 4]}, r"train_labels must have shape .*\[40, 4\] \(x.argmax\(1\)"),
        ({"train_labels": np.ones((40, 4), int)}, "train_labels must have shape .*several labels an image are not"),
        ({"train_labels": np.arange(40)[None] % 4}, r"train_labels must have shape .*, got \[1, 40\] \(x\[0\] makes"),
        ({"train_labels": np.array(["a"] * 40)}, "train_labels must be integers, got <U1 .*return_inverse"),
        ({"train_labels": np.zeros(40, "u8") + 2**63}, r"train_labels must lie in \[0, 1000\), got \[92"),
        ({f"{w}_labels": np.arange(n) % 4 + 1 for w, n in (("train", 40), ("val", 12), ("test", 20))},
         r"every class must have a training image, got none of 0 \(labels lie in \[1, 4\]: subtract 1\)"),
        ({f"{w}_labels": np.arange(n) % 4 * 2 for w, n in (("train", 40), ("val", 12), ("test", 20))},
         "every class must have a training image, got none of 1, 3, 5 .np.unique.*without gaps"),
        ({"test_labels": np.full(20, 5)}, "every class must have a training image, got none of 4, 5"),
        ({"train_images": np.zeros((40, 8, 8, 2), np.uint8)}, r"train_images must have shape .*, got \[40, 8, 8, 2\]"),
        ({"train_images": np.full((40, 8, 8), np.nan)}, "train_images must hold finite pixels, got 2560 that are not"),
        ({"train_images": np.full((40, 8, 8), 300.0)}, r"train_images must be floats in \[0, 1\] or \[0, 255\]"),
        ({"train_images": np.zeros((40, 8, 8), np.int64)}, "training images must differ, got 40 .* every pixel 0"),
        ({"train_images": np.zeros((40, 1, 8, 8), np.uint8)}, r"train_images must .*x.transpose\(0, 2, 3, 1\)"),
        ({"train_images": np.zeros((8, 8, 3, 40), np.uint8)}, r"train_images must .*x.transpose\(3, 0, 1, 2\)"),
        ({"train_images": np.zeros((40, 784), np.uint8)}, r"train_images must .*x.reshape\(-1, H, W\)"),
        ({"train_images": np.zeros((40, 8, 8, 4), np.uint8)}, "train_images must .*of RGBA keep"),
        ({"train_images": np.zeros((40, 8, 8), complex)}, "train_images must be integers .*, got complex128"),
        ({"valid_images": np.zeros((1, 8, 8))}, "source must hold one validation split, got .* with val_images, "),
        ({"val_images": None}, "source must hold val_images beside val_labels"),
        ({"train_images": np.zeros((40, 7, 8), np.uint8)}, "image size must be 8 to 224 px on both sides, got 7 x 8"),
        ({"train_images": np.zeros((40, 225, 8), np.uint8)}, "image size must be 8 to 224 px .*, got 225 x 8"),
        ({"test_images": np.zeros((20, 9, 8, 1), np.uint8)}, "test images must have the shape of the training"),
        ({f"{w}_labels": np.zeros(n, int) for w, n in (("train", 40), ("val", 12), ("test", 20))},
         "number of classes must be 2 to 1000, got 1"),
        ({"test_images": np.zeros((0, 8, 8), np.uint8), "test_labels": np.zeros(0, int)},
         "test split must hold at least one image, got 0"),
    ],
)  # fmt: skip
def test_bad_npz(tmp_path, changes, words):
    with pytest.raises(UserError, match=f"^data: {words}"):
        data.load(write_npz(tmp_path / "set.npz", **changes))


def test_unreadable_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: source must be digits, a .npz file or a folder"):
        data.load(tmp_path / "absent.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match="data: source must be a readable .npz file"):
        data.load(tmp_path / "broken.npz")
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="data: source must be a readable .npz file"):
        data.load(tmp_path / "short.npz")
    (tmp_path / "set.txt").write_text("x")
    with pytest.raises(UserError, match="data: source must be digits, a .npz file or a folder of images"):
        data.load(tmp_path / "set.txt")
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


def test_pickled_arrays_are_never_run(tmp_path):
    np.savez(tmp_path / "set.npz", **(arrays() | {"train_images": np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(UserError, match=r"data: source must hold a readable array train_images, got .*Python objects"):
        data.load(tmp_path / "set.npz")


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


def test_files_that_others_write(tmp_path):
    """Keys that are not needed are not read, whatever they hold; any case of the suffix; ``valid`` and bool labels."""
    found = data.load(write_npz(tmp_path / "a.npz", class_names=np.array([{}], dtype=object), extra=np.zeros(3)))
    assert found.notes == ("uint8 pixels in [0, 255]", "not read: 2 arrays of the file")
    (tmp_path / "a.npz").rename(tmp_path / "SET.NPZ")
    assert len(data.load(tmp_path / "SET.NPZ").train) == 40
    valid = {
        "val_images": None,
        "val_labels": None,
        "valid_images": arrays()["val_images"],
        "valid_labels": np.arange(12) % 4,
    }
    assert torch.equal(data.load(write_npz(tmp_path / "v.npz", **valid)).val.images, found.val.images)
    labels = {f"{which}_labels": arrays()[f"{which}_labels"] > 1 for which in ("train", "val", "test")}
    assert data.load(write_npz(tmp_path / "b.npz", **labels)).train.labels.tolist() == [0, 0, 1, 1] * 10


def test_keys_of_others_are_named_with_the_mend(tmp_path):
    held = arrays()
    for keys in (("x_train", "y_train", "x_test", "y_test"), ("trainX", "trainY", "testX", "testY"),
                 ("train_data", "train_target", "test_data", "test_target")):  # fmt: skip
        wanted = ("train_images", "train_labels", "test_images", "test_labels")
        np.savez(tmp_path / "x.npz", **{key: held[each] for key, each in zip(keys, wanted, strict=True)})
        renames = ", ".join(f"{key} to {each}" for key, each in zip(keys, wanted, strict=True))
        with pytest.raises(UserError, match=rf"without train_images, .*\(it holds {keys[0]}, .*; rename {renames}\)$"):
            data.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(UserError, match=r"\(it holds images, labels\)$"):
        data.load(tmp_path / "y.npz")


def test_damaged_archives_are_one_line(tmp_path):
    path = tmp_path / "set.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays())
        whole = path.read_bytes()
        for at in range(40, len(whole), len(whole) // 40):
            path.write_bytes(whole[:at] + bytes(b ^ 0x55 for b in whole[at : at + 8]) + whole[at + 8 :])
            with contextlib.suppress(UserError):
                data.load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: source must be a readable .npz file, got .* \(the file is empty\)"):
        data.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="^data: source must be a regular file"):
        data.load(path)


def test_train_and_val_alone_cut_their_test_and_say_so(tmp_path, caplog):
    write_folder(tmp_path / "set" / "train", {"a": 9, "b": 9})
    write_folder(tmp_path / "set" / "val", {"a": 2, "b": 2})
    with caplog.at_level(logging.INFO, "kr_fast"):
        found = data.load(tmp_path / "set")
    assert (len(found.train), len(found.val), len(found.test)) == (12, 4, 6)
    assert "no test split: 0.333 of the training images are taken for it" in found.notes
    assert "data: 22 images of 2 classes (train 12, val 4, test 6), 8 x 9 x 1; uint8 pixels in [0, 80]" in caplog.text


def test_images_on_both_sides_are_counted(tmp_path, caplog):
    held = arrays()
    held["test_images"][3:8] = held["train_images"][10:15]
    held["val_images"][:2] = held["train_images"][0]
    found = data.load(write_npz(tmp_path / "set.npz", **held))
    assert found.notes[1:] == (
        "2 of 12 val images are byte-equal to train images", "5 of 20 test images are byte-equal to train images",
    )  # fmt: skip
    assert "data: 5 of 20 test images are byte-equal" in caplog.text
    held["train_images"][:21] = 9
    warned = data.load(write_npz(tmp_path / "set.npz", **held)).notes[1]
    assert warned == "21 of 40 training images are one and the same"


def test_shapes_in_alpha_are_seen(tmp_path):
    for index in range(12):
        shape = np.zeros((8, 8, 4), np.uint8)
        shape[index % 8, : 4 + index % 3, 3] = 255
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(shape).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    found = data.load(tmp_path)
    assert found.train.images.unique().tolist() == [0, 255]
    assert "alpha composed on white in 12 images" in found.notes


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
    found = data.to_float(images)
    assert found.shape == (2, 3, 4, 4)
    assert found.dtype == torch.float32
    assert found[0].unique().tolist() == [-1.0]
    assert found[1].unique().tolist() == [1.0]


@pytest.mark.skipif(not (REAL / "retinamnist.npz").exists(), reason="needs the optional folder of real images")
def test_a_real_medical_set():
    found = data.load(REAL / "retinamnist.npz")
    assert found.image_shape == (28, 28, 3)
    assert found.num_classes == 5
    assert (len(found.train), len(found.val), len(found.test)) == (1080, 120, 400)


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
