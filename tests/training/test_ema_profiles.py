"""Profiles of averages: lengths, inner products and combinations against integrals and sums in float64."""

import numpy as np
import pytest
from scipy.integrate import quad

from kr_fast.runtime.errors import UserError
from kr_fast.training.ema_profiles import LONGEST, coefficients, inner_product, power_of, sigma_rel

STEPS = 480


def profile(power, step, steps=STEPS):
    """The weight of each step in the average of PowerEMA, by the product of its decays; float64 ``[steps]``."""
    weights = np.zeros(steps)
    for t in range(1, step + 1):
        decay = (1 - 1 / t) ** (power + 1)
        weights *= decay
        weights[t - 1] = 1 - decay
    return weights


@pytest.mark.parametrize("length", [0.03, 0.1, 0.2, LONGEST])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    power = power_of(length)
    assert sigma_rel(power) == pytest.approx(length, rel=1e-9)
    moments = [quad(lambda s, k=k: (power + 1) * s ** (power + k), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("length", [0, -1, 0.3, float("nan")])
def test_lengths_that_no_profile_has(length):
    with pytest.raises(UserError, match=r"power_of: length must be in \(0, 0.2887\], got"):
        power_of(length)


@pytest.mark.parametrize(
    ("first", "second"), [((3.0, 200), (7.0, 480)), ((7.0, 480), (3.0, 200)), ((2.0, 90), (5.0, 90))]
)
def test_inner_products_are_integrals(first, second):
    (g, a), (h, b) = first, second
    product = lambda s: (g + 1) * s**g / a ** (g + 1) * (h + 1) * s**h / b ** (h + 1)  # noqa: E731
    expected = quad(product, 0, min(a, b))[0]
    assert float(inner_product(*map(np.float64, (g, a, h, b)))) == pytest.approx(expected, rel=1e-9)


KEPT = [(power_of(length), step) for length in (0.05, 0.1) for step in range(20, STEPS + 1, 20)]  # 24 of each


# The shortest and the longest that an option takes, one in between, at the end and before it.
@pytest.mark.parametrize("step", [360, STEPS])
@pytest.mark.parametrize("length", [0.03, 0.075, 0.15, 0.2])
def test_a_combination_has_the_profile_of_its_length(length, step):
    """Within 5 %, several times nearer than any kept average alone, and no further than the best combination."""
    kept = [(power, at) for power, at in KEPT if at <= step]
    x = coefficients(*zip(*kept, strict=True), power_of(length), step)
    assert x.sum() == pytest.approx(1, abs=1e-9)
    columns, sought = np.stack([profile(*each) for each in kept], 1), profile(power_of(length), step)
    distance = lambda y: np.linalg.norm(columns @ y - sought) / np.linalg.norm(sought)  # noqa: E731
    assert distance(x) < 0.05
    assert distance(x) < 0.4 * min(distance(unit) for unit in np.eye(len(kept)))
    assert distance(x) < 1.05 * distance(np.linalg.lstsq(columns, sought)[0]) + 1e-3


def test_a_kept_average_is_itself():
    x = coefficients(*zip(*KEPT, strict=True), *KEPT[20])
    assert x == pytest.approx(np.eye(len(KEPT))[20], abs=1e-6)
