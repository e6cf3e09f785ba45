"""Equal and near images of splits are counted, listed and chosen to be dropped."""

import pytest
import torch

from kr_fast.data import distances, duplicates, find_duplicates
from kr_fast.runtime.errors import UserError


def splits():
    """Random images, which are far apart; of val 0 and 1 equal train 0 and 0, 2 is near train 1, 3 near val 4.

    Of test 0 equals val 0, 1 is near val 4, 2 is near val 2 but not near train 1, 3 equals test 4.
    """
    images = torch.randint(0, 256, (60, 9, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train, val, test = (part.clone() for part in images.split([30, 20, 10]))
    val[0], val[1] = train[0], train[0]
    train[1] = train[1].clamp(40, 215)
    val[2], test[2] = train[1] + 15, train[1] + 30  # the threshold is about 23, a quarter of 92
    val[3] = val[3] // 2 + 60
    val[4] = val[3] + 2
    test[0], test[1], test[3] = val[0], val[4] + 3, test[4]
    return {"train": train, "val": val, "test": test}


def test_duplicates_of_splits():
    found = find_duplicates(splits())
    assert 15 < found.threshold < 30
    assert found.threshold == found.spacing / 4
    assert found.counts["exact"] == {
        "train": 0, "val": 2, "test": 2, "val_train": 2, "test_train": 1, "test_val": 1
    }  # fmt: skip
    assert found.counts["near"] == {
        "train": 0, "val": 4, "test": 2, "val_train": 3, "test_train": 1, "test_val": 3
    }  # fmt: skip
    every = found.to_drop(("val", "test"))
    assert {name: mask.nonzero()[:, 0].tolist() for name, mask in every.items()} == {
        "train": [], "val": [0, 1, 2], "test": [0, 1]  # test 2 is near val 2 alone, which is dropped
    }  # fmt: skip
    assert found.to_drop(("test",))["test"].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert not found.to_drop(("test",))["val"].any()
    assert not any(mask.any() for mask in found.to_drop(()).values())
    rows = [(row["split"], row["index"], row["of_split"], row["of_index"], row["dropped"]) for row in found.rows(every)]
    assert rows[:4] == [
        ("val", 0, "train", 0, True),
        ("val", 1, "train", 0, True),
        ("test", 0, "train", 0, True),
        ("test", 4, "test", 3, False),
    ]
    assert sorted(rows[4:]) == [
        ("test", 1, "val", 3, True),
        ("test", 1, "val", 4, True),
        ("test", 2, "val", 2, False),
        ("val", 2, "train", 1, True),
        ("val", 4, "val", 3, False),
    ]


def test_without_neighbours_only_equal_images_are_duplicates():
    image = torch.full((1, 8, 8, 1), 9, dtype=torch.uint8)
    found = find_duplicates({"train": image, "val": torch.cat([image + 1, image]), "test": image[:0]})
    assert found.threshold == 0
    assert found.counts["near"] == found.counts["exact"]
    assert found.to_drop(("val", "test"))["val"].tolist() == [False, True]


def test_find_duplicates_refuses_what_cannot_be_compared():
    image = torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"^find_duplicates: val images must be uint8 \[N, 8, 8, 1\]"):
        find_duplicates({"train": image, "val": image[:, :7]})
    with pytest.raises(UserError, match=r"^find_duplicates: splits must hold at least one image"):
        find_duplicates({"train": image[:0]})


@pytest.mark.parametrize("of_train", [0, 1, 40])  # no member, one, many of the crowd are trained on
def test_crowds_count_as_all_their_pairs(of_train, monkeypatch):
    """Blank images of each split, some dropped, against the search that lists every pair of them."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 6, 6, 1), generator=draw, dtype=torch.uint8)
    images[:120] = 250 + images[:120] % 4
    train, val, test = torch.randperm(180, generator=draw).add(120).split([60, 60, 60])
    val, test = torch.cat([val, torch.arange(40, 80)]), torch.cat([test, torch.arange(80, 120)])
    parts = {"train": torch.cat([train, torch.arange(of_train)]), "val": val, "test": test}
    splits = {name: images[rows] for name, rows in parts.items()}
    results = []
    for most in (2048, 100):
        monkeypatch.setattr(distances, "SAMPLE", most)
        duplicates._KEPT.clear()
        monkeypatch.setattr(duplicates, "spacing", lambda images: 32.0)
        results.append(find_duplicates(splits))
    every, crowds = results
    assert int((crowds.pairs.crowds >= 0).sum()) == 80 + of_train
    assert len(crowds.pairs) == 79 + of_train < len(every.pairs)
    assert crowds.counts == every.counts
    for later in (("val", "test"), ("test",)):
        first, second = (found.to_drop(later) for found in results)
        assert all(torch.equal(first[name], second[name]) for name in splits)
