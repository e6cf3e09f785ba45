"""Figures of generated images: against direct computation in float64, and against what theory says of known sets."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel

from kr_fast.metrics import frechet_distance, kernel_distance, neighbourhood_figures, set_figures
from kr_fast.runtime.errors import UserError


def normal(count, width, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, width))


def unbiased(x, y):
    """Binkowski et al., eq. 4, by scikit-learn's kernel, whose gamma is 1 / d."""
    own = [(polynomial_kernel(a, degree=3, coef0=1), len(a)) for a in (x, y)]
    alike = sum((k.sum() - k.trace()) / (n * (n - 1)) for k, n in own)
    return alike - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean()


def fid(x, y):
    """As pytorch-fid and torchmetrics have it: by the root of the product of covariances, which is not symmetric."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(s @ t).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)


def test_kernel_distance_is_the_unbiased_estimate_of_each_subset():
    real, made = normal(50, 7), normal(40, 7, 1, 0.5)
    result = kernel_distance(real.astype(np.float32), torch.from_numpy(made.astype(np.float32)), seed=5, subsets=3)
    assert (result["subsets"], result["subset_size"]) == (3, 20)  # half of the fewer images
    rng, values = np.random.default_rng(5), []
    real, made = real.astype(np.float32).astype(np.float64), made.astype(np.float32).astype(np.float64)
    for _ in range(3):
        values.append(unbiased(real[rng.choice(50, 20, replace=False)], made[rng.choice(40, 20, replace=False)]))
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


def test_frechet_distance_is_that_of_the_root_of_the_product():
    real, made = normal(60, 7) @ np.diag(np.arange(1, 8)), normal(40, 7, 1, 0.5)
    assert frechet_distance(real, made) == pytest.approx(fid(real, made), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    # Whitened to mean 0 and covariance 1, then scaled and shifted: |shift|^2 + sum (scale - 1)^2.
    white = np.linalg.qr(np.hstack([np.ones((50, 1)), normal(50, 3)]))[0][:, 1:] * 7
    assert frechet_distance(white, white * [2, 1, 0] + [0, 3, 0]) == pytest.approx(1 + 0 + 1 + 9, rel=1e-6)
    few = frechet_distance(real[:4], made)  # singular, where a root by iteration fails
    assert few == pytest.approx(fid(real[:4], made), rel=1e-5)
    with pytest.raises(UserError, match=r"^frechet_distance: real must be float \[N, d\] of at least 2 images"):
        frechet_distance(real[:1], made)


def test_figures_of_a_set_are_those_of_each_function():
    """Different numbers; parts of 4 and of 3 or 2; more than a block of 1,024 rows of the kernel."""
    for count, other in ((80, 50), (1100, 30)):
        real, made = normal(count, 3), normal(other, 3, 1, 0.3)
        result = set_figures(real, made, seed=2)
        assert result["fid"] == pytest.approx(frechet_distance(real, made))
        assert result["kid"] == pytest.approx(unbiased(real, made), rel=1e-9)
        expected = neighbourhood_figures(real, made)
        assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_intervals_of_a_set_are_those_of_a_jackknife():
    """Six images of either side, each a part of its own: KID by leaving out one pair after the other."""
    real, made = normal(6, 2), normal(6, 2, 1, 0.3)
    result = set_figures(real, made, seed=4)
    orders = [np.random.default_rng(4 + side).permutation(6) for side in range(2)]
    left = [[np.flatnonzero(order % 6 != part) for order in orders] for part in range(6)]
    without = np.array([unbiased(real[i], made[j]) for i, j in left])
    reach = 2.5705818 * np.sqrt(5 / 6 * ((without - without.mean()) ** 2).sum())  # t of 5 degrees of freedom
    assert result["kid_ci"] == pytest.approx([result["kid"] - reach, result["kid"] + reach], rel=1e-6)
    without = np.array([fid(real[i], made[j]) for i, j in left])
    centre = 6 * result["fid"] - 5 * without.mean()
    reach = 2.5705818 * np.sqrt(5 / 6 * ((without - without.mean()) ** 2).sum())
    assert result["fid_ci"] == pytest.approx([max(centre - reach, 0), max(centre + reach, 0)], rel=1e-6)
    assert set_figures(normal(20, 11), normal(30, 11))["fid_ci"] is None  # fewer than two images for each feature
    for name in ("precision", "recall", "coverage"):
        low, high = result[f"{name}_ci"]
        assert 0 <= low <= result[name] <= high <= 1


def test_intervals_of_a_set_hold_what_they_are_of():
    """Of N(0, 1) and N(0.5, 0.64) in each of 4 dimensions the distance is 4 (0.25 + 0.04); 40 draws of 120 images.

    Of 95 % intervals 33 or fewer of 40 hold it with probability 0.03 %; the standard errors of the others are compared
    with the spread over the draws, which itself errs by 11 %.
    """
    draws = []
    for at in range(40):
        real, made = normal(120, 4, 2 * at + 10), 0.8 * normal(120, 4, 2 * at + 11) + 0.5
        draws.append(set_figures(real, made))
    assert sum(each["fid_ci"][0] <= 1.16 <= each["fid_ci"][1] for each in draws) > 33
    for name in ("kid", "density"):
        errors = [(each[f"{name}_ci"][1] - each[f"{name}_ci"][0]) / 2 / 2.093 for each in draws]
        assert np.mean(errors) == pytest.approx(np.std([each[name] for each in draws], ddof=1), rel=0.4)


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
