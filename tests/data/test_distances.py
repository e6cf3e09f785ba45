"""Distances of bytes are exact, and near images are those of a comparison of all pairs."""

import pytest
import torch

from kr_fast.data import distances
from kr_fast.data.distances import Rows, nearest, spacing, within

# A row of one product in float32; the longest such one; two pieces, the second of one value.
WIDTHS = {"short": (8, 8, 1), "one piece": (32, 32, 1), "pieces": (5, 41, 5)}


def drawn(shape, count=90, others=70, seed=0):
    """Random images, of which others 0 to 4 are copies, and 5 to 9 copies with noise of at most 2 grey levels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8) for n in (count, others))
    noise = torch.randint(-2, 3, y[5:10].shape, generator=generator)
    y[:5], y[5:10] = x[:5], (x[5:10].int() + noise).clamp(0, 255).to(torch.uint8)
    return x, y


def squares(x, y):
    return (x.flatten(1).long()[:, None] - y.flatten(1).long()[None]).square().sum(2)


def test_nearest_is_the_least_of_all_pairs(monkeypatch):
    """Over blocks of 35 rows and of 32 others."""
    x, y = drawn((8, 8, 1))
    monkeypatch.setattr(distances, "MOST_BYTES", 8 * 32 * 35)
    monkeypatch.setattr(distances, "SAMPLE", 32)
    assert torch.equal(nearest(Rows(x), y), squares(x, y).min(1).values.double().sqrt())


@pytest.mark.parametrize("shape", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_squared_distances_of_bytes_are_whole_numbers(shape, precision):
    x, y = drawn(shape)
    x[-1], y[-1] = 0, 255  # the largest there is
    torch.set_float32_matmul_precision(precision)
    try:
        result = Rows(x).squared_distances(Rows(y))
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = squares(x, y)
    exact = expected <= 2**24
    assert torch.equal(result.long()[exact], expected[exact])
    assert torch.allclose(result.double(), expected.double(), rtol=1e-6)


def test_squared_distances_of_features():
    generator = torch.Generator().manual_seed(0)
    x, y = 100 + torch.randn(40, 7, generator=generator), 100 + torch.randn(30, 7, generator=generator)
    expected = (x.double()[:, None] - y.double()[None]).square().sum(2)
    assert torch.allclose(Rows(x).squared_distances(Rows(y)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("threshold", [0.0, 2.0, 90.0])  # copies alone; noise too; about half of all pairs
def test_near_images_are_those_of_all_pairs(shape, threshold):
    x, y = drawn(shape)
    near = squares(x, y) <= threshold**2 * x[0].numel()
    first, second = within(x, y, threshold)
    assert torch.equal(first, near.any(1))
    assert torch.equal(second, near.any(0))
    assert int(first.sum()) >= (10 if threshold else 5)
    assert [part.tolist() for part in within(x, y[:0], threshold)] == [[False] * len(x), []]


def test_near_images_of_more_than_one_block():
    """2,048 images are one block of each side."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (5000, 2, 2, 1), generator=generator, dtype=torch.uint8)
    near = squares(x[:2100], x[2100:]) <= 4 * 3**2
    first, second = within(x[:2100], x[2100:], 3.0)
    assert torch.equal(first, near.any(1))
    assert torch.equal(second, near.any(0))
    assert 0 < int(first.sum()) < 2100


def test_near_images_of_long_rows_in_blocks_and_tiles(monkeypatch):
    """Smooth images, of which the direction they are sorted by tells nothing, in blocks of 16 and tiles of 3 rows."""
    x, y = drawn((4, 4, 3), seed=3)
    x, y = (each.repeat_interleave(5, 1).repeat_interleave(5, 2) for each in (x, y))
    monkeypatch.setattr(distances, "SAMPLE", 16)
    monkeypatch.setattr(distances, "TILE_BYTES", 4 * 3 * x[0].numel())
    monkeypatch.setattr(distances, "SIGNED", 500)
    for threshold in (1.5, 80.0, 100.0):  # copies and noise, a few and a third of all pairs, as sums leave few and most
        near = squares(x, y) <= threshold**2 * x[0].numel()
        first, second = within(x, y, threshold)
        assert torch.equal(first, near.any(1))
        assert torch.equal(second, near.any(0))
    assert 0.2 < float(near.double().mean()) < 0.4


def test_spacing_is_the_median_over_neighbours():
    x, _ = drawn((8, 8, 1))
    gaps = squares(x, x).double()
    gaps.fill_diagonal_(torch.inf)
    assert spacing(x) == pytest.approx(float((gaps.min(1).values / 64).sqrt().median()), rel=1e-6)
    # Of more images than are asked the median of a part, which is near that of all.
    many = torch.randint(0, 256, (5000, 4, 4, 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    gaps = Rows(many).squared_distances(Rows(many))
    gaps.fill_diagonal_(torch.inf)
    assert spacing(many) == pytest.approx(float((gaps.min(1).values / 16).sqrt().median()), rel=0.05)
