"""Post-hoc EMA: the average of any length as a combination of averages that were kept during training.

A :class:`PowerEMA` of power g holds, after step t, the weights' average over all steps with the profile
``p(s) = (g + 1) s^g / t^(g + 1)`` on [0, t]. Its length is the standard deviation of that profile as a share of t,
``sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3)))``, at most ``sqrt(1 / 12)`` (g = 0, the plain mean).

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, section 3 and
appendix C (algorithms 2 and 3).
"""

from collections.abc import Sequence

import numpy as np

from kr_fast.runtime.errors import fail

LONGEST = 12**-0.5


def sigma_rel(power: float) -> float:
    """The length of an average of this power."""
    return ((power + 1) / ((power + 2) ** 2 * (power + 3))) ** 0.5


def power_of(length: float) -> float:
    """The power of an average of this length: the largest root of ``g^3 + 7 g^2 + (16 - r) g + 12 - r``, r = length^-2.

    Raises: ValueError unless ``length`` is in (0, sqrt(1 / 12)].
    """
    if not 0 < length <= LONGEST:
        fail("power_of", "length", f"be in (0, {LONGEST:.4g}]", length)
    r = length**-2
    return max(0.0, float(np.roots([1, 7, 16 - r, 12 - r]).real.max()))


def inner_product(powers: np.ndarray, steps: np.ndarray, power: np.ndarray, step: np.ndarray) -> np.ndarray:
    """``integral of p(s) q(s) ds`` of two profiles that end at ``steps`` and ``step``, of shapes that broadcast.

    ``(g + 1) (h + 1) (a / b)^h / ((g + h + 1) b)`` where g ends at a, h at b and a <= b.
    """
    earlier = steps < step
    exponent = np.where(earlier, power, -powers)
    return (powers + 1) * (power + 1) * (steps / step) ** exponent / ((powers + power + 1) * np.maximum(steps, step))


def coefficients(powers: Sequence[float], steps: Sequence[int], power: float, step: int) -> np.ndarray:
    """float64 ``[n]``: of each kept average in the combination that is nearest to the average of ``power`` at ``step``.

    The least squares of the difference of profiles among combinations that sum to 1, so that a weight that never moved
    stays as it is: ``x = A^-1 (b - m 1)`` with the inner products A of the kept profiles, b of each with the sought
    one, and ``m = (1' A^-1 b - 1) / (1' A^-1 1)``. The source has m = 0.

    Args:
        powers, steps: of each kept average: its power, and the step after which it was kept.
    """
    g, t = np.asarray(powers, np.float64), np.asarray(steps, np.float64)
    of_kept = inner_product(g[:, None], t[:, None], g, t)
    of_sought = inner_product(g, t, np.float64(power), np.float64(step))
    free, ones = np.linalg.solve(of_kept, np.stack([of_sought, np.ones_like(g)], 1)).T
    return free - (free.sum() - 1) / ones.sum() * ones
