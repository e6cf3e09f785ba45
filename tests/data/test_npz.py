"""What an ``.npz`` of anybody's making gives: the images that it holds by one rule, or one line with the remedy."""

import contextlib
import os

import numpy as np
import pytest
import torch
from data_cases import arrays, read_or_refused, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast import data
from kr_fast.runtime.errors import UserError


def test_npz_keeps_its_own_splits(tmp_path):
    expected = arrays()
    actual = data.load(write_npz(tmp_path / "set.npz"))
    assert actual.name == "set"
    assert (len(actual.train), len(actual.val), len(actual.test)) == (40, 12, 20)
    assert np.array_equal(actual.train.images.numpy(), expected["train_images"])
    assert np.array_equal(actual.test.labels.numpy(), expected["test_labels"][:, 0])


@pytest.mark.parametrize(
    ("size", "words"), [(8, "of 6 x 8 brought to one size by pad"), (16, "by pad, 72 of them enlarged")]
)
def test_resizing_is_told_once_and_as_of_files(tmp_path, size, words):
    held = arrays()
    images = {name: each[:, :6] for name, each in held.items() if name.endswith("images")}
    loaded = data.load(
        write_npz(tmp_path / "set.npz", **images), options=data.ReadOptions(image_size=size, resize="pad")
    )
    (note,) = (each for each in loaded.notes if "brought to one size" in each)
    assert note.startswith("72 images of 6 x 8 ")
    assert note.endswith(words)


def test_npz_without_val_is_cut(tmp_path):
    path = write_npz(tmp_path / "set.npz", val_images=None, val_labels=None)
    actual = data.load(path, val_fraction=0.2)
    assert (len(actual.train), len(actual.val), len(actual.test)) == (32, 8, 20)
    assert torch.bincount(actual.val.labels).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (np.full((40, 8, 8), 7, np.uint8), 7),  # no channel axis
        (np.full((40, 8, 8, 1), 0.5, np.float32), 128),  # in [0, 1]
        (np.full((40, 8, 8, 1), 200.4, np.float64), 200),  # in [0, 255]
    ],
)
def test_pixels_of_other_kinds(tmp_path, images, expected):
    images[0] = 0
    scale = 255.0 if images.max() < 1 else 1
    others = {
        f"{which}_images": (arrays()[f"{which}_images"] / scale).astype(images.dtype) for which in ("val", "test")
    }
    actual = data.load(write_npz(tmp_path / "set.npz", train_images=images, **others))
    assert actual.train.images.unique().tolist() == [0, expected]
    assert np.array_equal(actual.test.images, arrays()["test_images"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": None}, "source must hold the keys .*, got .* without train_labels"),
        ({"val_labels": None}, "source must hold val_labels beside val_images"),
        ({"train_labels": np.arange(40) - 1}, r"train_labels must lie in \[0, 1000\), got \[-1, 38\]"),
        ({"train_labels": np.arange(40) * 30}, r"train_labels must lie in \[0, 1000\), got \[0, 1170\]"),
        ({"train_labels": np.zeros(39, int)}, r"train_labels must have shape \[40\] or \[40, 1\] .*, got \[39\]"),
        ({"train_labels": np.zeros((40, 14), int)}, r"train_labels must have shape .*, got \[40, 14\]"),
        ({"train_labels": np.full(40, 0.5)}, "train_labels must be integers or names of classes, got float64"),
        ({"train_labels": np.full(40, np.nan)}, "train_labels must be integers or names of classes, got float64"),
        ({"train_labels": np.eye(4)[np.arange(40) % 4] * 2}, r"train_labels must have shape .*, got \[40, 4\]"),
        ({"train_labels": np.ones((40, 4), int)}, "train_labels must have shape .*several labels an image are not"),
        ({"train_labels": np.arange(40)[None] % 4}, r"train_labels must have shape .*, got \[1, 40\] \(x\[0\] makes"),
        ({"train_labels": np.array(["a"] * 40)}, "val_labels must hold names of classes, as train_labels does"),
        ({f"{w}_labels": np.array(["a|b", "a"] * (n // 2)) for w, n in (("train", 40), ("val", 12), ("test", 20))},
         r"train_labels must hold one label an image .*, got a\|b"),
        ({"train_labels": np.zeros(40, "u8") + 2**63}, r"train_labels must lie in \[0, 1000\), got \[92"),
        ({f"{w}_labels": np.arange(n) % 4 + 1 for w, n in (("train", 40), ("val", 12), ("test", 20))},
         r"every class must have a training image, got none of 0 \(labels lie in \[1, 4\]: subtract 1\)"),
        ({f"{w}_labels": np.arange(n) % 4 * 2 for w, n in (("train", 40), ("val", 12), ("test", 20))},
         "every class must have a training image, got none of 1, 3, 5 .np.unique.*without gaps"),
        ({"test_labels": np.full(20, 5)}, "every class must have a training image, got none of 4, 5 .np.unique"),
        ({"test_labels": np.arange(20) % 5}, r"every class must have a training image, got none of 4 \(4 in test:"),
        ({"train_labels": np.arange(40) % 2 * 2 - 1}, r"train_labels must .*, got \[-1, 1\] \(of two .*labels > 0"),
        ({"train_images": np.zeros((40, 8, 8, 2), np.uint8)}, r"train_images must have shape .*, got \[40, 8, 8, 2\]"),
        ({"train_images": np.full((40, 8, 8), np.nan)}, "train_images must hold finite pixels, got 2560 that are not"),
        ({"train_images": np.full((40, 8, 8), 300.0)}, r"train_images must be floats in \[0, 1\] or \[0, 255\]"),
        ({"train_images": np.zeros((40, 8, 8), np.int64)}, "training images must differ, got 40 .* every pixel 0"),
        ({"train_images": np.zeros((40, 8, 8, 8), np.uint8)}, "train_images must .*of volumes take slices first"),
        ({"train_images": np.zeros((40, 4, 8, 8), np.uint8)}, "train_images must .*of RGBA keep"),
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


def test_pickled_arrays_are_never_run(tmp_path):
    np.savez(tmp_path / "set.npz", **(arrays() | {"train_images": np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(UserError, match=r"data: source must hold a readable array train_images, got .*Python objects"):
        data.load(tmp_path / "set.npz")


def test_files_that_others_write(tmp_path):
    """Keys that are not needed are not read, whatever they hold; any case of the suffix; ``valid`` and bool labels."""
    actual = data.load(write_npz(tmp_path / "a.npz", class_names=np.array([{}], dtype=object), extra=np.zeros(3)))
    counts = (
        "images of each class in train / val / test: 0 (10 / 3 / 5), 1 (10 / 3 / 5), 2 (10 / 3 / 5), 3 (10 / 3 / 5)"
    )
    assert actual.notes == ("uint8 pixels in [0, 255]", "not read: 2 arrays of the file", counts)
    (tmp_path / "a.npz").rename(tmp_path / "SET.NPZ")
    assert len(data.load(tmp_path / "SET.NPZ").train) == 40
    valid = {
        "val_images": None,
        "val_labels": None,
        "valid_images": arrays()["val_images"],
        "valid_labels": np.arange(12) % 4,
    }
    assert torch.equal(data.load(write_npz(tmp_path / "v.npz", **valid)).val.images, actual.val.images)
    labels = {f"{which}_labels": arrays()[f"{which}_labels"] > 1 for which in ("train", "val", "test")}
    assert data.load(write_npz(tmp_path / "b.npz", **labels)).train.labels.tolist() == [0, 0, 1, 1] * 10


def test_layouts_of_others_are_the_same_set(tmp_path):
    """Whatever the order of axes and bytes, the kind of labels and the names of keys: the same images and classes."""
    held, splits = arrays(shape=(8, 9, 3)), ("train", "val", "test")
    expected = data.load(write_npz(tmp_path / "a.npz", **held))
    numbers = {which: held[f"{which}_labels"][:, 0] for which in splits}
    for change, note in (
        (
            lambda key, x: x.transpose(0, 3, 1, 2) if "images" in key else x,
            "images [N, C, H, W] transposed to [N, H, W, C]",
        ),
        (lambda key, x: (x / 255.0).astype(">f4") if "images" in key else x, "float32 pixels in [0, 1], times 255"),
        (
            lambda key, x: x.astype(">u2") * 257 if "images" in key else x,
            "uint16 pixels, the largest 65535, divided by 257",
        ),
        (lambda key, x: np.asfortranarray(x), "uint8 pixels in [0, 255]"),
        (
            lambda key, x: np.eye(4, dtype=np.float32)[x[:, 0]] if "labels" in key else x,
            "one-hot labels read as the index of the 1",
        ),
        (
            lambda key, x: x.astype("f8") if "labels" in key else x,
            "float64 labels, which are whole numbers, read as integers",
        ),
        (lambda key, x: np.array(list("abcd"))[x] if "labels" in key else x, "labels are names of classes"),
        (lambda key, x: np.array(list("abcd"), "S1")[x[:, 0]] if "labels" in key else x, "labels are names of classes"),
    ):
        actual = data.load(write_npz(tmp_path / "b.npz", **{key: change(key, x) for key, x in held.items()}))
        assert actual.fingerprint == expected.fingerprint, note
        assert note in actual.notes
        assert actual.class_names == (tuple("abcd") if "names" in note else tuple("0123"))
    for keys in (("x_{}", "y_{}"), ("{}X", "{}Y"), ("{}_data", "{}_target")):
        of = {
            each.format(which): held[f"{which}_{what}"]
            for which in splits
            for each, what in zip(keys, ("images", "labels"), strict=True)
        }
        np.savez(tmp_path / "x.npz", **of)
        actual = data.load(tmp_path / "x.npz")
        assert actual.fingerprint == expected.fingerprint
        assert f"read from {', '.join(of)}" in actual.notes
    for keys in (("images", "labels"), ("arr_0", "arr_1"), ("x", "y"), ("X", "Y"), ("X", "y")):
        np.savez(tmp_path / "y.npz", **{keys[0]: held["train_images"], keys[1]: numbers["train"]})
        _, classes, parts = data.load_uncut(tmp_path / "y.npz")
        assert (classes, list(parts)) == (tuple("0123"), ["all"])
        assert torch.equal(parts["all"].images, expected.train.images)


def test_keys_that_may_mean_two_things_are_named(tmp_path):
    held = arrays()
    np.savez(tmp_path / "x.npz", x_train=held["train_images"], y_train=0, x_test=0, y_test=0, train_data=0)
    with pytest.raises(
        UserError, match=r"without train_images, .*\(it holds x_train, .*; rename x_train to train_images"
    ):
        data.load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", train_images=held["train_images"], y_train=0, test_images=0, test_labels=0)
    with pytest.raises(UserError, match=r"without train_labels \(it holds .*; rename y_train to train_labels\)$"):
        data.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=np.zeros(3), names=np.zeros(3))
    with pytest.raises(UserError, match=r"\(it holds images, names\)$"):
        data.load(tmp_path / "y.npz")


@pytest.mark.parametrize("size", [28, 64, 128, 224])
def test_medmnist_of_every_size(tmp_path, size):
    """By its file, name_SIZE.npz; the two ends and the two sizes between that the official files have."""
    images = {f"{which}_images": np.full((2, size, size, 3), 9, np.uint8) for which in ("train", "val", "test")}
    for at, each in enumerate(images.values()):
        each[0], each[1, 0, 0] = at, 255
    labels = {f"{which}_labels": np.array([[0], [1]], np.uint8) for which in ("train", "val", "test")}
    np.savez(tmp_path / f"pathmnist_{size}.npz", **images, **labels)
    actual = data.load(tmp_path / f"pathmnist_{size}.npz")
    assert (actual.name, actual.image_shape) == (f"pathmnist_{size}", (size, size, 3))
    assert torch.equal(actual.test.images, torch.from_numpy(images["test_images"]))


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


@st.composite
def members(draw):
    """Arrays as others store them: dtypes, byte orders, memory orders, shapes and ranges of all kinds; few or wrong."""
    actual = {}
    pixels = draw(
        st.sampled_from(["u1", "?", "<u2", ">u2", "i4", ">i8", "<f2", ">f4", "f8", "longdouble", "c8", "U3", "O"])
    )
    white = draw(st.sampled_from([1, 255] if pixels in ("u1", "<f2") else [1, 255, 255, 255, 4095, 65535]))
    channel = draw(st.sampled_from([(), (1,), (3,), (4,)]))
    labels = draw(st.sampled_from(["u1", "<i4", ">i8", "u8", "?", "f4", "U1"]))
    first = draw(st.sampled_from([0, 0, 0, 1, -1]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    for which, count in (("train", 16), ("val", 4), ("test", draw(st.sampled_from([0, 1, 4])))):
        images = np.linspace(0, 1, 256)[random.integers(0, 256, (count, 8, 8, *channel))] * white
        images.flat[:2] = (0, white)[: min(2, images.size)]
        actual[f"{which}_images"] = (np.rint(images) if white > 1 and pixels[-1] in "1248" else images).astype(pixels)
        actual[f"{which}_labels"] = (np.arange(count) % 2 + first).astype(labels)
        if draw(st.booleans()):
            actual[f"{which}_images"] = np.asfortranarray(actual[f"{which}_images"])
        if draw(st.booleans()):
            actual[f"{which}_labels"] = actual[f"{which}_labels"][:, None]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        actual.pop(draw(st.sampled_from(sorted(actual))))
    if draw(st.booleans()):
        actual["names"] = np.array([{}, "a"], dtype=object)
    return actual, white


@settings(deadline=None, max_examples=150)
@given(made=members(), compressed=st.booleans())
def test_any_archive_is_read_by_one_rule_or_refused_in_one_line(tmp_path_factory, made, compressed):
    held, white = made
    path = tmp_path_factory.getbasetemp() / "any.npz"
    (np.savez_compressed if compressed else np.savez)(path, **held)
    result = read_or_refused(lambda: data.load_uncut(path))
    if result is None:
        return
    name, classes, splits = result
    assert name == "any"
    assert list(splits) == [which for which in ("train", "val", "test") if f"{which}_images" in held]
    for which, split in splits.items():
        images = held[f"{which}_images"]
        white = 1 if images.dtype == bool else white
        expected = np.clip(np.rint(images.astype(np.float64) * (255 / white)), 0, 255)
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images, expected if expected.ndim == 4 else expected[..., None])
        labels = held[f"{which}_labels"].ravel().astype(int)
        if held["train_labels"].dtype.kind == "U":  # names: their numbers are those of the sorted names
            labels = labels - min(each.ravel().astype(int).min() for key, each in held.items() if "labels" in key)
        assert split.labels.tolist() == labels.tolist()
        assert split.labels.max() < len(classes) if len(split) else True
