"""The same images from every kind of source are one set, so that a run on them is the same run, bit for bit."""

import numpy as np
import pytest
import torch
from data_cases import arrays, as_folder, as_npz, as_parquet, as_saved, as_shards, as_table

from kr_fast import data

SPLITS = ("train", "val", "test")


def held():
    """split -> (images in colour, labels), by class as folders are; sizes that no axis shares."""
    made = arrays(shape=(8, 9, 3), classes=3)
    order = {which: np.argsort(made[f"{which}_labels"][:, 0], kind="stable") for which in SPLITS}
    return {w: (made[f"{w}_images"][order[w]], made[f"{w}_labels"][order[w], 0]) for w in SPLITS}


def as_arrays(root, parts):
    return parts if len(parts) > 1 else next(iter(parts.values())), {}


@pytest.mark.parametrize("size", [{}, {"image_size": 12, "resize": "pad"}], ids=["as they are", "resized"])
@pytest.mark.parametrize("splits", [SPLITS, ("train",)])
def test_every_format_is_one_set(tmp_path, splits, size):
    """With the splits of the source, and cut by the seed; as they are, and resized."""
    parts = {which: held()[which] for which in splits}
    source, _ = as_arrays(None, parts)
    expected = data.load(source, seed=5, options=data.ReadOptions(**size))
    for write in (as_npz, as_folder, as_table, as_parquet, as_saved, as_shards):
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
