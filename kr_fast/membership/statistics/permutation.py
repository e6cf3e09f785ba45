"""Chance as it would be if any of the examples were the members: exact moments, and the tails that follow from them."""

import numpy as np


def upper_tail(z: float, skewness: float) -> float:
    """Probability that a standardised Pearson III variable of this skewness is above ``z``.

    Source: Mielke and Berry, "Permutation Methods" (2007).
    """
    from scipy.special import gammainc, gammaincc, ndtr

    if abs(skewness) < 1e-2:  # there the shape would be beyond 4e4; Cornish and Fisher's first term is as exact
        return float(ndtr(-z + skewness * (z * z - 1) / 6))
    shape = 4 / skewness**2
    at = max(0.0, shape + abs(z) * shape**0.5 * (1 if (z > 0) == (skewness > 0) else -1))
    return float(gammaincc(shape, at) if skewness > 0 else gammainc(shape, at))


def sum_above(values: np.ndarray, members: np.ndarray) -> float:
    """Probability that the values of as many examples, drawn by chance, have at least about the sum of the members'.

    By the exact mean, variance and skewness of such a sum (Pearson III).

    Args:
        values: float64 ``[N]``; members: bool ``[N]``.
    """
    total, drawn = len(values), int(members.sum())
    centred = values - values.mean()
    second, third = float((centred**2).mean()), float((centred**3).mean())
    if second <= 1e-24 or not 0 < drawn < total:
        return 0.5
    pairs = drawn * (total - drawn)
    skewness = 0.0
    if total > 2:
        skewness = (total - 2 * drawn) * (total - 1) ** 0.5 / ((total - 2) * pairs**0.5) * third / second**1.5
    return upper_tail(float(centred[members].sum()) / (pairs * second / (total - 1)) ** 0.5, skewness)


def count_before(count: int, rank: int, members: int, others: int) -> float:
    """Probability that at least ``count`` members come before the ``rank``-th other in a random order of all.

    Negative hypergeometric: at most ``rank - 1`` of the first ``count + rank - 1`` examples are others.
    """
    from scipy.special import gammaln, logsumexp

    def ways(total: int, drawn: np.ndarray | int) -> np.ndarray | float:
        return gammaln(total + 1) - gammaln(drawn + 1) - gammaln(total - drawn + 1)

    first = count + rank - 1
    if count <= 0:
        return 1.0
    if first > members + others or count > members:
        return 0.0
    among = np.arange(max(0, first - members), min(rank, others + 1))  # others among the first
    logs = ways(others, among) + ways(members, first - among) - ways(members + others, first)
    return float(min(np.exp(logsumexp(logs)), 1.0)) if len(among) else 0.0
