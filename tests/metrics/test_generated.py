"""Figures of generated images: against direct computation in float64, and against what theory says of known sets."""

import numpy as np
import pytest
import torch

from kr_fast.metrics import kernel_distance, neighbourhood_figures
from kr_fast.runtime.errors import UserError


def normal(count, width, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, width))


def test_kernel_distance_is_the_unbiased_estimate_of_each_subset():
    real, made = normal(50, 7), normal(40, 7, 1, 0.5)
    result = kernel_distance(real.astype(np.float32), torch.from_numpy(made.astype(np.float32)), seed=5, subsets=3)
    assert (result["subsets"], result["subset_size"]) == (3, 20)  # half of the fewer images
    rng, values = np.random.default_rng(5), []
    real, made = real.astype(np.float32).astype(np.float64), made.astype(np.float32).astype(np.float64)
    for _ in range(3):
        x, y = real[rng.choice(50, 20, replace=False)], made[rng.choice(40, 20, replace=False)]
        xx, yy, xy = ((a[:, None] * b[None]).sum(2) / 7 for a, b in ((x, x), (y, y), (x, y)))
        pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
        alike = sum((xx[i, j] + 1) ** 3 + (yy[i, j] + 1) ** 3 for i, j in pairs) / (20 * 19)
        values.append(alike - 2 * ((xy + 1) ** 3).mean())
    assert result["mean"] == pytest.approx(np.mean(values), rel=1e-10)
    assert result["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-10)


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (1.0, 22.0)])
def test_kernel_distance_of_normal_distributions(shift, expected):
    """In one dimension it is ``sum_j binom(3, j) (E x^j - E y^j)^2``: of N(0, 1) and N(1, 1) 3 + 3 + 16.

    4,000 images are 8 disjoint subsets of 500, so the mean errs by about sd / sqrt(8).
    """
    result = kernel_distance(normal(4000, 1), normal(4000, 1, 1, shift), seed=0, subset_size=500)
    assert result["mean"] == pytest.approx(expected, abs=4 * result["sd"] / 8**0.5)
    assert 0 < result["sd"] < 5


def directly(real, made):
    """By the definitions; distances of whole numbers are exact."""

    def squares(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(2)

    def radius(a, k):
        return np.sort(squares(a, a), 1)[:, k]  # the image itself is the nearest

    between = squares(real, made)
    r3, r5, g3 = radius(real, 3), radius(real, 5), radius(made, 3)
    return {
        "precision": (between <= r3[:, None]).any(0).mean(),
        "recall": (between <= g3).any(1).mean(),
        "density": (between <= r5[:, None]).sum() / (5 * len(made)),
        "coverage": (between <= r5[:, None]).any(1).mean(),
    }


# The fewest; different numbers; more than a block of 2^22 distances, so that blocks are put together.
@pytest.mark.parametrize(("count", "made", "width"), [(6, 6, 1), (60, 40, 3), (2100, 2050, 2)])
def test_neighbourhood_figures_are_those_of_their_definitions(count, made, width):
    """Features are whole numbers, many of them equal: images on the surface of a ball lie in it."""
    rng = np.random.default_rng(count)
    real, generated = rng.integers(0, 40, (count, width)), rng.integers(10, 70, (made, width))
    result = neighbourhood_figures(real.astype(np.float32), generated.astype(np.float32))
    assert result == pytest.approx(directly(real, generated), rel=1e-12)


def test_neighbourhood_figures_of_known_sets():
    """Of one distribution density is 1 and coverage 1 - 2^-5 for many; far apart all are 0; few modes: precise only."""
    real, same = normal(800, 4), normal(800, 4, 1)
    result = neighbourhood_figures(real, same)
    assert result["density"] == pytest.approx(1, abs=0.1)
    assert result["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)
    assert set(neighbourhood_figures(real, same + 100).values()) == {0.0}
    few = neighbourhood_figures(real, real[:1] + 0.01 * same)
    assert few["precision"] > 0.95
    assert few["recall"] < 0.05
    assert few["coverage"] < 0.2


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((5, 2)), np.zeros((9, 2)), r"real must be float \[N, d\] of at least 6 images, got float64 \[5, 2\]"),
        (np.zeros((9, 2)), np.zeros((9, 3)), r"generated must be float \[N, 2\] of at least 6 images"),
        (np.zeros((9, 2), int), np.zeros((9, 2)), r"real must be float \[N, d\]"),
        (np.full((9, 2), np.inf), np.zeros((9, 2)), "real must be finite, got 18 values that are not"),
    ],
)
def test_what_is_no_features_is_refused(real, generated, message):
    with pytest.raises(UserError, match=f"^neighbourhood_figures: {message}"):
        neighbourhood_figures(real, generated)
