"""Rows of several parts are those of the parts joined, whatever is selected of them, and pixels are copied late."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.inputs import as_images
from kr_fast.runtime.storage import image_rows
from kr_fast.runtime.storage.image_rows import ImageRows, MappedFile, batches, hash_images, rows_of


@pytest.fixture
def parts(tmp_path):
    """A mapped file, an empty tensor, and a tensor."""
    draw = torch.Generator().manual_seed(0)
    first, last = (torch.randint(0, 256, (n, 3, 4, 1), generator=draw, dtype=torch.uint8) for n in (7, 5))
    (tmp_path / "a.u8").write_bytes(first.numpy().tobytes())
    return MappedFile(tmp_path / "a.u8", tuple(first.shape)), last[:0], last


@pytest.fixture
def joined(parts):
    return torch.cat([parts[0].images, *parts[1:]])


ORDER = torch.tensor([11, 0, 6, 7, 0, 3])
SELECTIONS = {
    "all": slice(None),
    "steps": slice(1, 11, 3),
    "beyond the end": slice(9, 40),
    "none": slice(5, 5),
    "of one part": slice(2, 5),
    "mask": torch.arange(12) % 3 == 1,
    "order": ORDER,
    "numpy": ORDER.numpy(),
    "list": ORDER.tolist(),
}


@pytest.mark.parametrize("which", SELECTIONS.values(), ids=SELECTIONS)
def test_selections_are_those_of_the_joined_tensor(parts, joined, which):
    rows, expected = ImageRows(*parts), joined[which]
    assert torch.equal(rows[which], expected)
    chosen = rows.rows(which)
    assert (len(chosen), chosen.shape, chosen.numel()) == (len(expected), expected.shape, expected.numel())
    assert torch.equal(chosen[:], expected)
    again = torch.arange(len(expected)).flip(0)[::2]
    assert torch.equal(rows_of(chosen, again)[:], rows_of(expected, again))
    both = ImageRows(chosen, parts[2], chosen)
    assert torch.equal(both[:], torch.cat([expected, parts[2], expected]))


def test_single_rows(parts, joined):
    rows = ImageRows(*parts)
    assert all(torch.equal(rows[at], joined[at]) for at in (0, 6, 7, 11, -1, -12))


def test_batches_are_small_and_in_order(parts, joined, monkeypatch):
    monkeypatch.setattr(image_rows, "BATCH_BYTES", 5 * 3 * 4)
    for images in (ImageRows(*parts), joined):
        assert [len(part) for part in batches(images)] == [5, 5, 2]
        assert [len(part) for part in batches(images, 4)] == [4, 4, 4]
        assert torch.equal(torch.cat(list(batches(images))), joined)
        digest = hashlib.sha256()
        hash_images(digest, images)
        assert digest.digest() == hashlib.sha256(joined.numpy().tobytes()).digest()


def test_a_slice_of_one_part_is_a_view(parts):
    start = ImageRows(*parts)[1:4]
    assert start.data_ptr() == parts[0].images[1:].data_ptr()


def test_mapped_parts_are_pickled_by_their_path(parts, joined):
    rows = ImageRows(*parts).rows(ORDER)
    data = pickle.dumps(rows)
    assert joined[:7].numpy().tobytes() not in data
    assert torch.equal(pickle.loads(data)[:], joined[ORDER])


def test_arguments_take_them(parts):
    rows = ImageRows(*parts)
    assert as_images("op", "images", rows) is rows
    with pytest.raises(UserError, match=r"op: images must be uint8 \[N, 3, 4, 3\], got uint8 \[12, 3, 4, 1\]"):
        as_images("op", "images", rows, (3, 4, 3))
    assert repr(rows) == "ImageRows([12, 3, 4, 1] of 3 parts)"
    assert np.stack([rows[0], rows[1]]).shape == (2, 3, 4, 1)
