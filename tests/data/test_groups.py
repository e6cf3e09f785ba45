"""Cuts of whole groups, near the share of each class that was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast import data
from kr_fast.data.groups import cut_by_group
from kr_fast.runtime.errors import UserError


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    classes=st.integers(1, 4),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_groups_are_cut_whole_and_leave_every_class(sizes, classes, fraction, seed):
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)) * 7, sizes)
    order = draw.permutation(len(groups))
    groups, labels = groups[order], draw.integers(classes, size=len(groups))
    out = cut_by_group(labels, groups, fraction, seed)
    assert np.array_equal(out, cut_by_group(labels, groups, fraction, seed))
    assert not np.intersect1d(groups[out], groups[~out]).size
    assert np.array_equal(np.unique(labels), np.unique(labels[~out]))
    removable = [len(np.unique(labels[groups != group])) == len(np.unique(labels)) for group in np.unique(groups)]
    assert out.any() == any(removable)


@pytest.mark.parametrize("fraction", [0.15, 1 / 3, 0.5])
def test_classes_are_cut_in_their_shares(fraction):
    """200 patients of 1 to 8 images, of which most have one class: within an image or two of the share."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 9, 200)
    groups, of_patient = np.repeat(np.arange(200), sizes), np.repeat(draw.choice(3, 200, p=[0.7, 0.2, 0.1]), sizes)
    labels = np.where(draw.random(len(groups)) < 0.9, of_patient, draw.integers(3, size=len(groups)))
    out = cut_by_group(labels, groups, fraction, 5)
    for label in range(3):
        mine = labels == label
        assert abs(out[mine].sum() - fraction * mine.sum()) <= 2
    # Groups of many images are as likely to be cut as others.
    large = np.mean(
        [cut_by_group(labels, groups, fraction, seed)[sizes.repeat(sizes) >= 6].mean() for seed in range(20)]
    )
    assert large == pytest.approx(fraction, abs=0.06)


def test_one_group_of_each_class_cannot_be_cut():
    labels = np.repeat([0, 1], 5)
    assert not cut_by_group(labels, labels, 0.3, 0).any()


def dataset(tmp_path, splits=None):
    """A folder of 40 images with a table: 10 patients of 4, of whom each has one class."""
    from PIL import Image

    draw = np.random.default_rng(0)
    lines = ["file,dx,patient" + (",split" if splits else "")]
    for index in range(40):
        name = f"{index}.png"
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / name)
        lines.append(f"{name},{index // 4 % 2},P-{index // 4}" + (f",{splits(index)}" if splits else ""))
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    options = {"table": str(tmp_path / "labels.csv"), "label_column": "dx", "group_column": "patient"}
    return tmp_path, data.ReadOptions(**options, **({"split_column": "split"} if splits else {}))


def test_no_group_lies_in_two_splits(tmp_path):
    source, options = dataset(tmp_path)
    for seed in range(3):
        loaded = data.load(source, seed=seed, options=options)
        groups = [set(getattr(loaded, name).groups.tolist()) for name in ("train", "val", "test")]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 10
        assert all(groups)


def test_given_splits_that_share_a_group_are_refused(tmp_path):
    source, options = dataset(tmp_path, lambda index: "test" if index == 3 or index >= 36 else "train")
    with pytest.raises(UserError, match=r"^data: group_column .*each group in one split, got .*P-0 in train and test"):
        data.load(source, options=options)
