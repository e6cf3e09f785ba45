"""Augmentation: off is the identity, each kind moves pixels as it says, all randomness comes from the generator."""

import pytest
import torch

from kr_fast.data import Augment, AugmentParams, augmented, to_float


def images(count=6, channels=2, height=10, width=12):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_off_is_the_identity():
    x = images()
    assert torch.equal(Augment()(x, draw()), x)


def test_flip_mirrors_about_half():
    x = images(400)
    result = Augment(flip=True)(x, draw())
    same = (result == x).flatten(1).all(1)
    mirrored = (result == x.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


def test_shift_moves_whole_pixels_and_repeats_the_border():
    x = images(50)
    result = Augment(shift=2)(x, draw())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    for before, after in zip(padded, result, strict=True):
        windows = [before[:, i : i + 10, j : j + 12] for i in range(5) for j in range(5)]
        assert any(torch.equal(window, after) for window in windows)


@pytest.mark.parametrize("augment", [Augment(rotate=15), Augment(scale=0.2), Augment(1, True, 10, 0.1)])
def test_resampling_stays_in_range_and_follows_the_generator(augment):
    x = images()
    first, again, other = augment(x, draw(1)), augment(x, draw(1)), augment(x, draw(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == x.shape
    assert float(first.min()) >= float(x.min()) - 1e-6
    assert float(first.max()) <= float(x.max()) + 1e-6


def test_rotation_turns_by_at_most_the_angle():
    """A bar through the middle, turned: its principal axis gives the angle back."""
    x = torch.zeros(200, 1, 41, 41)
    x[:, :, 19:22, 4:37] = 1
    result = Augment(rotate=30)(x, draw())
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    mass = result[:, 0]
    xx, yy, xy = ((mass * m).sum((1, 2)) for m in (columns**2, rows**2, rows * columns))
    angle = 0.5 * torch.atan2(2 * xy, xx - yy) * 180 / torch.pi
    assert float(angle.abs().max()) < 31
    assert float(angle.abs().max()) > 25
    assert abs(float(angle.mean())) < 5


def test_rotation_keeps_the_angles_of_oblong_images():
    """In pixels the map is ``s R``, of which ``(s R)^T s R = s^2 I``."""
    matrix = Augment(rotate=180, scale=0.5).draw(50, (6, 20), draw()).matrix[:, :, :2].double()
    half = torch.tensor([20, 6], dtype=torch.float64) / 2
    pixels = half[:, None] * matrix / half
    squares = pixels.mT @ pixels
    torch.testing.assert_close(squares, squares[:, :1, :1] * torch.eye(2).double(), rtol=0, atol=1e-5)


KINDS = [Augment(), Augment(flip=True), Augment(shift=2), Augment(2, True), Augment(1, True, 10, 0.1)]


@pytest.mark.parametrize("augment", KINDS, ids=str)
def test_tables_say_what_is_done_to_each_image(augment):
    """Drawn at once and applied to uint8 images row by row, in any grouping: the same as of float images together."""
    pool = torch.randint(0, 256, (9, 10, 12, 2), dtype=torch.uint8, generator=draw())
    index = torch.tensor([3, 3, 8, 0, 5, 1, 7])
    expected = augment(to_float(pool[index]), draw(4))
    draws = augment.draw(len(index), (10, 12), draw(4))
    torch.testing.assert_close(augmented(pool, index, draws), expected, rtol=0, atol=1e-6)
    for rows in (slice(0, 3), slice(3, 7), torch.tensor([6, 2])):
        assert torch.equal(augmented(pool, index[rows], draws[rows]), augmented(pool, index, draws)[rows])
    both = AugmentParams.stack([draws, draws])
    assert all(table is None or table.shape[:2] == (2, 7) for table in (both.flip, both.move, both.matrix))


def test_flip_stands_before_the_move():
    pool = torch.arange(12, dtype=torch.uint8).view(1, 1, 12, 1)
    moved = AugmentParams(torch.tensor([True]), torch.tensor([[0, 2]]))
    result = augmented(pool, torch.tensor([0]), moved).add(1).mul(127.5).round().view(-1).tolist()
    assert result == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]
