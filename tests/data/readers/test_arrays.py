"""Images in memory: what people hold in Python is the same set as the file of it, or one line says why not."""

import types

import numpy as np
import pytest
import torch
from data_cases import arrays, write_npz
from PIL import Image

from kr_fast import data
from kr_fast.runtime.errors import UserError

SPLITS = ("train", "val", "test")


class Items:
    """A map-style data set, as torch's are."""

    def __init__(self, images, labels, **attributes):
        self.images, self.labels = images, labels
        vars(self).update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def pillow(images):
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 9, 3)])
def test_every_form_is_the_same_set(tmp_path, shape):
    held = arrays(shape=shape)
    pairs = {which: (held[f"{which}_images"], held[f"{which}_labels"][:, 0]) for which in SPLITS}
    expected = data.load(write_npz(tmp_path / "set.npz", **held))
    channels_first = {which: torch.from_numpy(x).permute(0, 3, 1, 2) for which, (x, _) in pairs.items()}
    as_float = {which: (x / 255).float() for which, x in channels_first.items()}  # what torchvision's ToTensor gives
    items = [{"image": x, "label": y} for x, y in zip(*pairs["train"], strict=True)]
    for form in (
        pairs,
        {which: (channels_first[which], torch.tensor(y)) for which, (_, y) in pairs.items()},
        {"Train": pairs["train"], "valid": pairs["val"], "testing": Items(channels_first["test"], pairs["test"][1])},
        {which: Items(as_float[which], torch.tensor(y)) for which, (_, y) in pairs.items()},
        {which: Items(pillow(x), y.tolist()) for which, (x, y) in pairs.items()},
        {which: list(zip(x, y.tolist(), strict=True)) for which, (x, y) in pairs.items()},
        {
            which: torch.utils.data.TensorDataset(channels_first[which], torch.tensor(y))
            for which, (_, y) in pairs.items()
        },
        pairs | {"train": items},
        {which: getattr(expected, which) for which in SPLITS},
        expected,
    ):
        actual = data.load(form)
        assert actual.fingerprint == expected.fingerprint
        assert torch.equal(actual.val.images, expected.val.images)
    assert actual.notes == expected.notes


def test_one_set_is_cut_as_one_of_a_file(tmp_path):
    held = arrays()
    images, labels = held["train_images"], held["train_labels"][:, 0]
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    expected = data.load(tmp_path / "set.npz", seed=3)
    for form in (
        (images, labels),
        [images, labels],
        Items(pillow(images), labels),
        data.Split(*map(torch.tensor, (images, labels))),
    ):
        assert data.load(form, seed=3).fingerprint == expected.fingerprint
    named = data.load(Items(images, labels.tolist(), classes=["a", "b", "c", "d"]))
    assert (named.name, named.class_names) == ("Items", tuple("abcd"))
    features = {"image": None, "label": types.SimpleNamespace(names=list("efgh"))}  # of the package datasets
    assert data.load(Items(images, labels, features=features)).class_names == tuple("efgh")
    for dtype in (str, object):  # a column of pandas
        assert data.load((images, np.array(list("wxyz"), dtype)[labels])).class_names == tuple("wxyz")
    sizes = [Image.fromarray(images[row, : 8 - row % 2, :, 0]) for row in range(40)]
    small = data.load(Items(sizes, labels), options=data.ReadOptions(image_size=8, resize="pad"))
    assert small.image_shape == (8, 8, 1)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_transparent_colours_are_composed_as_those_of_files(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    pairs = []
    for row, each in enumerate(pixels):
        kind = "ab"[row % 2]
        path = tmp_path / "set" / kind / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        deep = Image.fromarray(each.astype(np.uint16) * 257)
        image = deep if mode == "I;16" else Image.fromarray(each).convert(mode)
        clear = {"RGB": (int(each[0, 0]),) * 3, "I;16": int(each[0, 0]) * 257}.get(mode, int(each[0, 0]))
        image.save(path, transparency=clear)
        pairs.append((path, kind))
    pairs.sort(key=lambda pair: pair[::-1])
    folder = data.load(tmp_path / "set")
    assert "alpha composed on white in 20 images" in folder.notes
    memory = data.load([(Image.open(path), kind) for path, kind in pairs])
    assert memory.fingerprint == folder.fingerprint


def test_groups_of_splits():
    held = {which: torch.arange(start, start + 6) for which, start in (("train", 0), ("val", 6), ("test", 12))}
    images = torch.arange(18, dtype=torch.uint8)[:, None, None, None].expand(18, 8, 8, 1) * 9
    parts = {which: data.Split(images[at], at % 2, at // 3) for which, at in held.items()}
    assert data.load(parts).test.groups.tolist() == [4, 4, 4, 5, 5, 5]
    shared = parts | {"test": data.Split(images[held["test"]], held["test"] % 2, held["train"] // 3)}
    with pytest.raises(
        UserError, match="^data: groups must have each group in one split, got 2 groups: 0 in train and test"
    ):
        data.load(shared)
    with pytest.raises(
        UserError, match="^data: groups must be given for every split, or for none, got those of train, val"
    ):
        data.load(shared | {"test": data.Split(images[held["test"]], held["test"] % 2)})


class Random(Items):
    def __getitem__(self, index):
        self.images = self.images + 1
        return super().__getitem__(index)


ZEROS = np.zeros((4, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (7, "source must be digits, a path, a pair .*, got 7"),
        ((ZEROS, [0, 1, 0]), r"labels must have shape \[4\] or \[4, 1\] .*, got \[3\]"),
        ((ZEROS, np.ones((4, 3))), r"labels must have shape .*several labels an image are not supported"),
        ((ZEROS, [0.5, 1, 0, 1]), "labels must be integers or names of classes, got float64"),
        ((ZEROS, ["a", None, "b", "a"]), "labels must be integers or names of classes, got object"),
        ((np.zeros((4, 64)), [0, 1, 0, 1]), r"images must have shape \[N, H, W\].*x.reshape"),
        ((ZEROS - 0.5, [0, 1, 0, 1]), "images must be floats in .*"),
        (
            {"train": (ZEROS, [0, 1, 0, 1]), "dev": 1},
            r"source must name its splits train, val and test.*got \['train', 'dev'\]",
        ),
        ({"test": (ZEROS, [0, 1, 0, 1])}, "source must name its splits .* have train"),
        (
            {"train": (ZEROS, [0, 1, 0, 1]), "test": (ZEROS, list("abab"))},
            "train labels must hold names of classes, as test",
        ),
        ({"train": (ZEROS, [0, 1, 0, 1]), "test": 3}, "test must be digits, a path, a pair .*, got 3"),
        (Random(ZEROS, [0, 1, 0, 1]), "source must return the same image each time .*, got two of index 0 that differ"),
        ([(ZEROS[0], 0, "extra")], r"source must return pairs \(image, label\), got .* of index 0"),
        ([(ZEROS[0], 0), (ZEROS[0, 1:], 1)], r"source images must have one shape and dtype, got uint8 \[8, 8, 1\] and"),
        (
            [(ZEROS[0], 0), (Image.new("L", (8, 8)), 1)],
            "source images must have one shape and dtype, got uint8 .* and Image",
        ),
        (
            [(Image.new("RGB", (8, 8)).convert("HSV"), 0)],
            "source images must have a mode that files have, such as L or RGB, got HSV",
        ),
        ([("a.png", 0)], "source must return images of Pillow or arrays, got 'a.png' of index 0"),
        (Items([], []), "source must hold at least one image, got 0"),
        (iter([1]), "source must be digits, a path, .*, got <list_iterator"),
        (torch.utils.data.DataLoader(list(range(3))), r"source must .* \(of a DataLoader give its .dataset\)$"),
        (
            type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": None})(),
            r"source must have a length \(list\(data\).*, got Stream",
        ),
    ],
)
def test_bad_sources(source, words):
    with pytest.raises(UserError, match=f"^data: {words}") as error:
        data.load(source)
    assert "\n" not in str(error.value)
