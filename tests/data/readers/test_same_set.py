"""The same images from every kind of source are one set, so that a run on them is the same run, bit for bit."""

import csv
import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_cases import arrays
from PIL import Image

from kr_fast import data

SPLITS = ("train", "val", "test")


def held():
    """split -> (images in colour, labels), by class as folders are; sizes that no axis shares."""
    made = arrays(shape=(8, 9, 3), classes=3)
    order = {which: np.argsort(made[f"{which}_labels"][:, 0], kind="stable") for which in SPLITS}
    return {w: (made[f"{w}_images"][order[w]], made[f"{w}_labels"][order[w], 0]) for w in SPLITS}


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def files_of(parts):
    """(split, class, name, content) of each image, in the order of the set."""
    for which, (images, labels) in parts.items():
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield which, int(label), f"{row:03d}.png", png(image)


def as_folder(root, parts):
    for which, label, name, content in files_of(parts):
        path = root / (which if len(parts) > 1 else "") / f"c{label}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root, {}


def as_table(root, parts):
    root.mkdir()
    with open(root.with_suffix(".csv"), "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "label", *(["split"] if len(parts) > 1 else [])))
        for which, label, name, content in files_of(parts):
            (root / f"{which} {name}").write_bytes(content)
            rows.writerow((f"{which} {name}", f"c{label}", *([which] if len(parts) > 1 else [])))
    return root, {"table": str(root.with_suffix(".csv"))}


def as_parquet(root, parts):
    root.mkdir()
    for split in parts:
        rows = [(content, f"c{label}") for which, label, _, content in files_of(parts) if which == split]
        columns = dict(zip(("image", "label"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), root / f"{split if len(parts) > 1 else 'set'}.parquet")
    return root, {}


def as_shards(root, parts):
    root.mkdir()
    for split in parts:
        with tarfile.open(root / f"{split if len(parts) > 1 else 'set'}-000000.tar", "w") as archive:
            for which, label, name, content in files_of(parts):
                for member, inside in ((name, content), (name[:-3] + "cls", f"c{label}".encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(inside)
                    if which == split:
                        archive.addfile(info, io.BytesIO(inside))
    return root, {}


def as_npz(root, parts):
    path = root.with_suffix(".npz")
    prefix = {which: f"{which}_" if len(parts) > 1 else "" for which in parts}
    images = {f"{prefix[which]}images": each for which, (each, _) in parts.items()}
    np.savez(path, **images, **{f"{prefix[which]}labels": each for which, (_, each) in parts.items()})
    return path, {}


def as_arrays(root, parts):
    return parts if len(parts) > 1 else next(iter(parts.values())), {}


@pytest.mark.parametrize("size", [{}, {"image_size": 12, "resize": "pad"}], ids=["as they are", "resized"])
@pytest.mark.parametrize("splits", [SPLITS, ("train",)])
def test_every_format_is_one_set(tmp_path, splits, size):
    """With the splits of the source, and cut by the seed; as they are, and resized."""
    parts = {which: held()[which] for which in splits}
    source, _ = as_arrays(None, parts)
    expected = data.load(source, seed=5, options=data.ReadOptions(**size))
    for write in (as_npz, as_folder, as_table, as_parquet, as_shards):
        source, options = write(tmp_path / write.__name__, parts)
        actual = data.load(source, seed=5, options=data.ReadOptions(**options, **size))
        assert actual.fingerprint == expected.fingerprint, write
        assert torch.equal(actual.test.images, expected.test.images)
        assert len(actual.class_names) == 3
        where = "images of each class in train / val / test: "
        counts = [note for note in actual.notes if note.startswith(where)]
        rows = [
            " / ".join(str(int((s.labels == c).sum())) for s in (actual.train, actual.val, actual.test))
            for c in range(3)
        ]
        assert counts == [where + ", ".join(f"{n} ({row})" for n, row in zip(actual.class_names, rows, strict=True))]
