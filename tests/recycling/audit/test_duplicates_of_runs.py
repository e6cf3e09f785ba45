"""What a run does with images that occur again in another split."""

import csv

import pytest
import torch
from toy_runs import metrics, new_context

from kr_fast.data import Dataset, Split
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import dataset, duplicates
from kr_fast.runtime.errors import UserError


def with_copies(tmp_path, **options) -> Context:
    """Val 0 equals train 3, test 1 is near train 5, and test 2 equals test 4."""
    made = new_context(tmp_path, **options)
    made.data.val.images[0] = made.data.train.images[3]
    made.data.train.images[5].clamp_(5, 250)
    made.data.test.images[1] = made.data.train.images[5] + 5
    made.data.test.images[2] = made.data.test.images[4]
    return made


@pytest.mark.parametrize(
    ("mode", "given", "val", "test"),
    [
        ("auto", set(), 9, 9),
        ("auto", {"train", "test"}, 9, 10),  # as published, and val is cut from train
        ("auto", {"train", "val", "test"}, 10, 10),
        ("drop", {"train", "val", "test"}, 9, 9),
        ("keep", set(), 10, 10),
    ],
)
def test_images_of_an_earlier_split_are_dropped(tmp_path, mode, given, val, test):
    run = with_copies(tmp_path, duplicates=mode)
    before = run.data
    duplicates.apply(run, frozenset(given))
    assert [len(getattr(run.data, name)) for name in ("train", "val", "test")] == [20, val, test]
    assert torch.equal(run.data.val.images, before.val.images[10 - val :])
    rows = [0, *range(2, 10)] if test == 9 else list(range(10))
    assert torch.equal(run.data.test.images, before.test.images[rows])
    assert torch.equal(run.data.test.labels, before.test.labels[rows])
    figures = dataset.run(run)["duplicates"]
    assert figures["exact"] == {"train": 0, "val": 0, "test": 2, "val_train": 1, "test_train": 0, "test_val": 0}
    assert figures["near"] == {"train": 0, "val": 0, "test": 2, "val_train": 1, "test_train": 1, "test_val": 0}
    assert figures["dropped"] == {"val": 10 - val, "test": 10 - test}
    with open(run.folder.duplicates) as file:
        listed = [
            (row["split"], row["index"], row["of_split"], row["of_index"], row["dropped"])
            for row in csv.DictReader(file)
        ]
    assert listed == [
        ("val", "0", "train", "3", str(val == 9)),
        ("test", "4", "test", "2", "False"),
        ("test", "1", "train", "5", str(test == 9)),
    ]
    (note,) = run.data.notes
    assert note.startswith("images with a near-duplicate (within ")
    done = {(10, 10): "all are kept", (9, 10): "1 of val are dropped", (9, 9): "1 of val and 1 of test are dropped"}
    assert note.endswith(
        f"in an earlier split: 1 of val in train (1 byte-equal), 1 of test in train; {done[val, test]}"
    )


def test_groups_go_with_their_images(tmp_path):
    run = with_copies(tmp_path)
    groups = {name: torch.arange(len(getattr(run.data, name))) for name in ("train", "val", "test")}
    parts = {
        name: Split(getattr(run.data, name).images, getattr(run.data, name).labels, groups[name]) for name in groups
    }
    run.data = Dataset("made", run.data.class_names, **parts)
    duplicates.apply(run, frozenset())
    assert run.data.test.groups.tolist() == [0, *range(2, 10)]


def test_a_split_within_another_cannot_be_dropped(tmp_path):
    run = new_context(tmp_path, duplicates="drop")
    run.data.test.images[:] = run.data.train.images[:10]
    with pytest.raises(
        UserError, match=r"^run: duplicates must be keep, or the test split hold .*got drop with 10 of 10"
    ):
        duplicates.apply(run, frozenset(("train", "val", "test")))


@pytest.mark.pipeline
def test_a_run_tells_its_duplicates(finished):
    """Digits hold none."""
    figures = metrics(finished[0])["dataset"]["duplicates"]
    assert set(figures["near"].values()) == {0}
    assert figures["dropped"] == {"val": 0, "test": 0}
    assert (finished[0] / "private" / "duplicates.csv").read_text().count("\n") == 1
