"""Lower bounds of the privacy parameters from rates and counts.

If training were (epsilon, delta)-differentially private, every attack would obey ``TPR <= e^epsilon FPR + delta`` and
``1 - FPR <= e^epsilon (1 - TPR) + delta`` (Kairouz et al., ICML 2015). So an attack that beats them, with confidence,
bounds epsilon from below. A bound of 0 says that this attack found nothing, never that there is privacy.
"""

import numpy as np

from kr_fast.membership.statistics.intervals import check_share, clopper_pearson
from kr_fast.runtime.errors import fail


def epsilon_of_rates(tpr: np.ndarray, fpr: np.ndarray, delta: float = 0.0) -> np.ndarray:
    """Largest epsilon that (TPR, FPR) refute, at least 0: both inequalities of the module's header."""
    with np.errstate(divide="ignore", invalid="ignore"):
        members = np.log(np.maximum(tpr - delta, 0) / fpr)
        others = np.log(np.maximum(1 - fpr - delta, 0) / (1 - tpr))
    return np.maximum(np.nan_to_num(np.maximum(members, others), nan=0.0, neginf=0.0), 0.0)


def epsilon_of_counts(
    hits: np.ndarray, positives: int, misses: np.ndarray, negatives: int, error: float, delta: float
) -> float:
    """The bound from true and false positives at thresholds fixed without these data, which share ``error``."""
    each = error / 2 / len(hits)
    low, high = clopper_pearson(hits, positives, each)[0], clopper_pearson(misses, negatives, each)[1]
    return float(epsilon_of_rates(low, high, delta).max())


def count_grid(count: int, ratio: float = 1.1) -> np.ndarray:
    """0 .. count, geometric from both ends: the counts that share the error. Depends on nothing but the count."""
    half = [0.0]
    while half[-1] < count / 2:
        half.append(max(half[-1] + 1, np.floor(half[-1] * ratio)))
    near = np.minimum(np.asarray(half, dtype=np.int64), count)
    return np.unique(np.concatenate([near, count - near]))


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Largest epsilon that ``right`` of ``guesses`` about ``canaries`` refute at ``error``, by bisection."""
    if one_run_p(canaries, guesses, right, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 1.0
    while one_run_p(canaries, guesses, right, high, delta) <= error and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if one_run_p(canaries, guesses, right, middle, delta) <= error else (low, middle)
    return low


def one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """P-value of at least ``right`` right guesses under (epsilon, delta)-DP: appendix D, with its loop as one array."""
    from scipy.special import bdtr, bdtrc

    q = 1 / (1 + np.exp(-epsilon))
    least = bdtrc(right - 1, guesses, q) if right > 0 else 1.0  # P[Binomial >= right]
    if delta == 0 or right == 0:
        return min(1.0, float(least))
    i = np.arange(1, right + 1)
    below = np.where(i < right, bdtr(np.maximum(right - i - 1, 0), guesses, q), 0.0)  # P[Binomial <= right - i - 1]
    alpha = float((np.maximum(bdtr(right - 1, guesses, q) - below, 0) / i).max())
    return min(1.0, float(least) + 2 * canaries * delta * alpha)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian-DP at ``delta``: the root of ``Phi(-e/mu + mu/2) - exp(e) Phi(-e/mu - mu/2) = delta``.

    Raises: UserError for a ``mu`` that is not finite, or a ``delta`` outside (0, 1).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    check_share("epsilon_of_mu", "delta", delta)
    if not -float("inf") < mu < float("inf"):
        fail("epsilon_of_mu", "mu", "be finite", mu)
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        return ndtr(-epsilon / mu + mu / 2) - np.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, mu * mu / 2 + 40 * mu))


def check_delta(where: str, delta: float) -> None:
    """Refuse what is not in [0, 1). Raises: UserError."""
    if not 0 <= delta < 1:
        fail(where, "delta", "be in [0, 1)", delta)
