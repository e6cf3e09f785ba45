"""Lower bounds of the privacy parameters from an attack: valid for the threshold that was chosen on the data.

If training were (epsilon, delta)-differentially private, every attack would obey ``TPR <= e^epsilon FPR + delta`` and
``1 - FPR <= e^epsilon (1 - TPR) + delta`` (Kairouz et al., ICML 2015). So an attack that beats them, with confidence,
bounds epsilon from below. A bound of 0 says that this attack found nothing, never that there is privacy.
"""

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.inputs.pool import scored
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.membership.statistics.intervals import check_share, clopper_pearson
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer

STRATEGIES = ("bonferroni", "split", "multi_split")
SPLITS = 11  # odd, so that the median is one of them
GUESS_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


def epsilon_clopper_pearson(
    scores: Tensor,
    members: Tensor,
    *,
    delta: float = 0.0,
    level: float = 0.95,
    strategy: str = "bonferroni",
    thresholds: tuple[float, ...] | None = None,
    seed: int = 0,
) -> float:
    """A bound that is at most epsilon with probability ``level``, from Clopper-Pearson bounds of TPR and FPR.

    Half of the error goes to the TPR, half to the FPR. Strategies for the threshold:

    - "bonferroni": all thresholds. A threshold with ``k`` false positives has a true FPR no larger than that of the
      ``k+1``-th highest non-member, which is Beta(k+1, n-k): Clopper-Pearson's upper bound at ``k``. The error is
      shared out over a fixed list of counts ``k`` (geometric from both ends), not over every threshold; the best for
      each count is determined by the non-members alone, so the TPR's bound is binomial.
    - "split": the threshold is chosen on a random half and evaluated once on the other.
    - "multi_split": the median over 11 random splits, each at half of the error (an average of p-values at most doubles
      them, so the median of the bounds is wrong no more often than stated; Rueger 1978).
    - ``thresholds``: a list fixed before the scores were seen; the error is shared out over it.

    Args:
        scores: ``[N]``, higher for members.
        members: bool ``[N]``.
        delta: of the definition, in [0, 1).
        level: coverage.
        strategy: see above; ignored when ``thresholds`` are given.
        seed: of the splits.
    Raises: TypeError or ValueError naming the argument.
    """
    where = "epsilon_clopper_pearson"
    _check(where, delta, level)
    scores, members = scored(where, scores, members)
    if strategy not in STRATEGIES:
        fail(where, "strategy", f"be one of {', '.join(STRATEGIES)}", strategy)
    if thresholds is not None:
        thresholds = as_numbers(where, "thresholds", thresholds).double().numpy()
        if thresholds.ndim != 1 or thresholds.size == 0 or np.isnan(thresholds).any():
            fail(where, "thresholds", "hold at least one, and no NaN", thresholds.tolist())
        curve = roc(scores, members)
        at = np.searchsorted(-curve.thresholds, -thresholds, side="right")
        return _best(curve, at, 1 - level, delta)
    if strategy == "bonferroni":
        low, high = simultaneous_rates(roc(scores, members), level)
        return float(epsilon_of_rates(low, high, delta).max())
    generator = torch.Generator().manual_seed(seed)
    error = (1 - level) if strategy == "split" else (1 - level) / 2
    found = [
        _split(scores, members, generator, error, delta) for _ in range(1 if strategy == "split" else SPLITS)
    ]  # fmt: skip
    return sorted(found)[(len(found) - 1) // 2]


def epsilon_of_rates(tpr: np.ndarray, fpr: np.ndarray, delta: float = 0.0) -> np.ndarray:
    """Largest epsilon that (TPR, FPR) refute, at least 0: both inequalities of the module's header."""
    with np.errstate(divide="ignore", invalid="ignore"):
        members = np.log(np.maximum(tpr - delta, 0) / fpr)
        others = np.log(np.maximum(1 - fpr - delta, 0) / (1 - tpr))
    return np.maximum(np.nan_to_num(np.maximum(members, others), nan=0.0, neginf=0.0), 0.0)


def count_grid(count: int, ratio: float = 1.1) -> np.ndarray:
    """0 .. count, geometric from both ends: the counts that share the error. Depends on nothing but the count."""
    half = [0.0]
    while half[-1] < count / 2:
        half.append(max(half[-1] + 1, np.floor(half[-1] * ratio)))
    near = np.minimum(np.asarray(half, dtype=np.int64), count)
    return np.unique(np.concatenate([near, count - near]))


def simultaneous_rates(curve: Curve, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(lower bounds of TPR, upper bounds of FPR) that hold together for all thresholds, see "bonferroni" above."""
    counts = count_grid(curve.negatives)[:-1]  # with all non-members flagged nothing is learnt
    error = (1 - level) / 2 / len(counts)
    low = clopper_pearson(curve.members_above(counts), curve.positives, error)[0]
    return low, clopper_pearson(counts, curve.negatives, error)[1]


def _best(curve: Curve, points: np.ndarray, error: float, delta: float) -> float:
    """The bound from points of the curve (0 is the empty one) that were fixed without these data."""
    tp, fp = np.concatenate([[0], curve.tp])[points], np.concatenate([[0], curve.fp])[points]
    each = error / 2 / len(points)
    low, high = clopper_pearson(tp, curve.positives, each)[0], clopper_pearson(fp, curve.negatives, each)[1]
    return float(epsilon_of_rates(low, high, delta).max())


def _split(scores: Tensor, members: Tensor, generator: torch.Generator, error: float, delta: float) -> float:
    """Choose on one half of members and of non-members, evaluate on the other."""
    half = torch.zeros_like(members)
    for side in (members, ~members):
        index = side.nonzero()[:, 0]
        half[index[torch.randperm(len(index), generator=generator)[: len(index) // 2]]] = True
    chosen_on, tested_on = (m for m in (half, ~half))
    if min(int((members & half).sum()), int((~members & half).sum())) == 0:
        return 0.0
    first = roc(scores[chosen_on], members[chosen_on])
    # Of the points with so many false positives, the ones with most members: no need to try every threshold.
    points = np.unique(np.searchsorted(first.fp, count_grid(first.negatives), side="right") - 1)
    points = points[points >= 0]
    low = clopper_pearson(first.tp[points], first.positives, error / 2)[0]
    high = clopper_pearson(first.fp[points], first.negatives, error / 2)[1]
    threshold = first.thresholds[points[int(epsilon_of_rates(low, high, delta).argmax())]]
    second = roc(scores[tested_on], members[tested_on])
    at = np.searchsorted(-second.thresholds, [-threshold], side="right")
    return _best(second, at, error, delta)


def epsilon_one_run(
    scores: Tensor,
    members: Tensor,
    *,
    delta: float = 0.0,
    level: float = 0.95,
    guesses: int | None = None,
    seed: int = 0,
) -> float:
    """The one-run bound: every example is a canary that was included by a fair coin of its own.

    The ``r / 2`` highest scores are guessed in, the ``r / 2`` lowest out. If training is (epsilon, delta)-DP the number
    of right guesses is at most Binomial(r, e^eps / (1 + e^eps)), up to a term in delta. The examples of one model are
    not independent, so Clopper-Pearson's bound does not hold for them in the strict sense; this one does.

    Args:
        scores, members: as of :func:`epsilon_clopper_pearson`; about half of the examples must be members.
        delta, level: as there.
        guesses: ``r``, fixed before the scores were seen; None shares the error out over 1, 5, 10, 20, 50, 100 % of N.
        seed: orders tied scores, so that the order of the examples cannot help the guesses.
    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2,
        algorithm of appendix D.
    """
    where = "epsilon_one_run"
    _check(where, delta, level)
    scores, members = scored(where, scores, members)
    total = len(scores)
    check_fair_coins(where, members)
    guesses = None if guesses is None else as_integer(where, "guesses", guesses)
    if guesses is not None and not 1 <= guesses <= total:
        fail(where, "guesses", f"be in [1, {total}]", guesses)
    counts = sorted({max(1, int(total * share)) for share in GUESS_SHARES}) if guesses is None else [guesses]
    mixed = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    order = mixed[scores[mixed].argsort(descending=True, stable=True)]
    truth = members[order].long()
    best = 0.0
    for count in counts:
        high, low = (count + 1) // 2, count // 2
        right = int(truth[:high].sum()) + int((1 - truth[total - low :]).sum())
        best = max(best, one_run_bound(total, count, right, delta, (1 - level) / len(counts)))
    return best


def check_fair_coins(where: str, members: Tensor) -> None:
    """Refuse members that no fair coin for each example has made: half of them, to five standard deviations."""
    total, inside = len(members), int(members.sum())
    if abs(inside - total / 2) > 2.5 * total**0.5:
        fail(where, "members", "be about half of the examples: each included by a fair coin", f"{inside} of {total}")


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Largest epsilon that ``right`` of ``guesses`` about ``canaries`` refute at ``error``, by bisection."""
    if _one_run_p(canaries, guesses, right, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 1.0
    while _one_run_p(canaries, guesses, right, high, delta) <= error and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _one_run_p(canaries, guesses, right, middle, delta) <= error else (low, middle)
    return low


def _one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
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


def gaussian_mu(scores: Tensor, members: Tensor, *, level: float = 0.95) -> float:
    """A lower bound of mu if training is mu-Gaussian-DP: ``Phi^-1(TPR) - Phi^-1(FPR)`` at its largest, at least 0.

    TPR and FPR are bounded for all thresholds together, as in :func:`epsilon_clopper_pearson`. It says something of
    epsilon only for a mechanism that *is* Gaussian; then it is far tighter, for the best threshold for mu lies where
    there are many examples.
    Source: Dong, Roth and Su, "Gaussian Differential Privacy", JRSS B 2022; Nasr et al., USENIX Security 2023.
    """
    from scipy.special import ndtri

    _check("gaussian_mu", 0.0, level)
    low, high = simultaneous_rates(roc(scores, members), level)
    mu = np.where((low > 0) & (high < 1), ndtri(np.clip(low, 1e-300, 1)) - ndtri(np.clip(high, 0, 1 - 1e-16)), 0.0)
    return float(max(0.0, mu.max()))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian-DP at ``delta``: the root of ``Phi(-e/mu + mu/2) - exp(e) Phi(-e/mu - mu/2) = delta``."""
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


def _check(where: str, delta: float, level: float) -> None:
    if not 0 <= delta < 1:
        fail(where, "delta", "be in [0, 1)", delta)
    check_share(where, "level", level)
