"""Near pairs are those of a comparison of all pairs at all shifts, whatever bounds left out."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast.data import distances
from kr_fast.data import near_pairs as module
from kr_fast.data.distances import spacing
from kr_fast.data.near_pairs import near_pairs
from kr_fast.runtime.storage.image_rows import ImageRows

# Fewer pixels than directions; grey; means of 3 x 3 with pixels left over, in colour.
SHAPES = {"few": (4, 4, 1), "grey": (9, 8, 1), "means": (13, 21, 3)}


def drawn(shape, count=26, seed=0):
    """Smooth random images, of which 5 to 9 are noisy copies and 10 to 14 shifted copies of others, 15 a mirrored."""
    draw = np.random.default_rng(seed)
    height, width, channels = shape
    coarse = draw.integers(0, 256, (count, 3, 3, channels), dtype=np.uint8).squeeze(-1 if channels == 1 else ())
    images = np.stack([np.asarray(Image.fromarray(each).resize((width, height), 2)) for each in coarse])
    images = images.reshape(count, *shape)
    noise = draw.integers(-2, 3, (5, *shape))
    images[5:10] = (images[:5].astype(int) + noise).clip(0, 255)
    images[10:15] = np.roll(images[:5], (1, -1), (1, 2))
    images[15] = images[16, :, ::-1]
    return torch.from_numpy(images)


def expected_pairs(images, threshold):
    """(first, second) -> (distance, whether it is of a shift), by numpy over all pairs and 9 shifts."""
    x = images.numpy().astype(np.int64)
    height, width = x.shape[1:3]
    pairs = {}
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            a = x[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)].reshape(len(x), -1)
            b = x[:, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)].reshape(len(x), -1)
            squares = np.stack([np.square(each - b).sum(1) for each in a])
            for i, j in np.argwhere(np.triu(squares <= threshold**2 * a.shape[1], 1)):
                value = float(np.sqrt(squares[i, j] / a.shape[1])), (dy, dx) != (0, 0)
                pairs[i, j] = min(pairs.get((i, j), value), value)
    return pairs


CASES = [(name, threshold, "highest") for name in SHAPES for threshold in (0.0, 4.0, 40.0)] + [("grey", 4.0, "medium")]
SMALL = {"ROWS": 16, "COLUMNS": 8, "WIDEST": 8, "WIDEST_SIGNED": 16, "BAND_BYTES": 4096, "PAIRS_AT_A_TIME": 9}


# All shifts at once, then pairs one by one, with signs; each shift by itself, with signs and products; with neither.
COSTS = {
    "listed": {"LISTED_COST": 0, "SIGNED_COST": 0, "PRODUCT_COST": 0},
    "signed": {"LISTED_COST": 10**9, "SIGNED_COST": 0, "PRODUCT_COST": 10**6},
    "alone": {"LISTED_COST": 10**9, "SIGNED_COST": 10**6, "PRODUCT_COST": 0},
}


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("shape", "threshold", "precision"), CASES)  # shifted copies alone; noisy too; many pairs
def test_near_pairs_are_those_of_all_pairs(shape, threshold, precision, costs, monkeypatch):
    """Over several blocks of both sides, 7 x 8 images, several parts of images, and bands of several rows."""
    values = int(np.prod(SHAPES[shape]))
    sizes = COSTS[costs] | {"SUMS_COST": 0, "MOST_BYTES": 7 * values, "PIXELS": 3 * values, "TILE_BYTES": 14 * values}
    for name, value in (SMALL | sizes).items():
        monkeypatch.setattr(module if hasattr(module, name) else distances, name, value)
    images = drawn(SHAPES[shape])
    torch.set_float32_matmul_precision(precision)
    try:
        result = near_pairs(ImageRows(images[:7], images[7:7], images[7:]), threshold)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = expected_pairs(images, threshold)
    assert list(zip(result.first.tolist(), result.second.tolist(), strict=True)) == sorted(expected)
    assert result.distance.tolist() == pytest.approx([expected[key][0] for key in sorted(expected)])
    assert result.shifted.tolist() == [expected[key][1] for key in sorted(expected)]
    assert result.complete
    assert len(result) >= (10 if threshold else 5)


def test_planted_copies_are_near_and_mirrored_ones_are_not():
    images = drawn((28, 28, 1), count=200)
    again = []
    for image in images[20:40]:
        file = io.BytesIO()
        Image.fromarray(image[..., 0].numpy()).save(file, "JPEG", quality=75)
        again.append(torch.from_numpy(np.array(Image.open(file)))[..., None])
    shifted = images[40:60].roll((-1, 1), (1, 2))
    result = near_pairs(torch.cat([images, torch.stack(again), shifted, images[60:80].flip(2)]), 5.0)
    pairs = set(zip(result.first.tolist(), result.second.tolist(), strict=True))
    assert pairs == {
        *((k, k + 5) for k in range(5)),
        *((k, k + 10) for k in range(5)),
        *((k + 5, k + 10) for k in range(5)),
        *((k, k + 180) for k in range(20, 60)),
    }


@pytest.mark.parametrize(("shape", "widest"), [((9, 8, 1), 32), ((18, 16, 1), 8)])  # of pixels; of means, then pixels
def test_few_pixels_are_compared_where_no_direction_tells_images_apart(shape, widest, monkeypatch):
    """One direction leaves nearly all pairs of noise, and so do its means."""
    images = torch.randint(0, 256, (300, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[150:160] = (images[:10].int() + 3).clamp(max=255).to(torch.uint8)
    for name, value in (("DIRECTIONS", 1), ("WIDEST", widest), ("ROWS", 100)):
        monkeypatch.setattr(module, name, value)
    compared, squares = [], module.squared_differences
    monkeypatch.setattr(module, "squared_differences", lambda *given: compared.append(len(given[1])) or squares(*given))
    result = near_pairs(images, spacing(images) / 4)
    assert list(zip(result.first.tolist(), result.second.tolist(), strict=True)) == [(k, k + 150) for k in range(10)]
    assert sum(compared) < 0.01 * 4.5 * 300**2


@pytest.mark.parametrize("count", [1, 2, 30])
def test_equal_images_are_pairs(count):
    result = near_pairs(torch.full((count, 8, 8, 1), 7, dtype=torch.uint8), 0.0)
    assert len(result) == count * (count - 1) // 2
    assert not result.shifted.any()


@pytest.mark.parametrize(("most", "complete"), [(10, False), (190, True)])
def test_more_pairs_than_are_kept(most, complete, monkeypatch):
    """Of 20 images each pair is found 9 times, and counts once."""
    monkeypatch.setattr(module, "MOST_PAIRS", most)
    result = near_pairs(torch.zeros(20, 8, 8, 1, dtype=torch.uint8), 1.0)
    assert (result.complete, len(result)) == (complete, 190)
    assert not result.distance.any()
    assert not result.shifted.any()


def test_blank_images_are_compared_by_products(monkeypatch):
    """Nearly blank ones, each near all others, among noise: the sums that pixels give, without comparing pairs."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 12, 12, 3), generator=draw, dtype=torch.uint8)
    images[:30] = 250 + images[:30] % 5
    block, j = images[torch.randperm(60, generator=draw)], torch.arange(60)
    i, j = torch.cartesian_prod(j, j)[: 40 * 60].T
    shift = (1, -1)
    by_products = module.squared_differences(block, i, images, j, shift)
    monkeypatch.setattr(distances, "PRODUCT_COST", 0)
    assert torch.equal(by_products, module.squared_differences(block, i, images, j, shift))


def blank(count, noise, seed=0):
    """``count`` nearly blank images in two crowds, white and grey, and others of noise."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count + noise, 6, 6, 1), generator=draw, dtype=torch.uint8)
    images[:count] %= 4
    images[: count // 2] += 250
    images[count // 2 : count] += 100
    return images[torch.randperm(len(images), generator=draw)]


def test_crowds_are_compared_with_their_first_image_alone(monkeypatch):
    """A crowd of n images takes 9 (n - 1) comparisons, not n^2, and no pair of it is lost to the counts of splits."""
    monkeypatch.setattr(distances, "SAMPLE", 100)
    images, compared, squares = blank(400, 60), [], module.squared_differences
    monkeypatch.setattr(module, "squared_differences", lambda *given: compared.append(len(given[1])) or squares(*given))
    found = near_pairs(images, 8.0)
    assert found.crowds.unique(return_counts=True)[1].tolist() == [60, 200, 200]
    assert sum(compared) < 10 * 400
    expected = expected_pairs(images, 8.0)
    listed = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    same = {(i, j) for i, j in expected if found.crowds[i] == found.crowds[j] >= 0}
    assert len(same) == 2 * 200 * 199 // 2
    assert listed - same == set(expected) - same
    firsts = [int((found.crowds == number).nonzero()[0]) for number in (0, 1)]
    assert listed & same == {pair for pair in same if pair[0] in firsts}
    assert found.distance.tolist() == pytest.approx([expected[pair][0] for pair in sorted(listed)])
