"""Lower bounds of epsilon from scores and members: valid for the threshold that was chosen on the data."""

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.inputs.pool import scored
from kr_fast.membership.statistics.bounds import (
    check_delta,
    count_grid,
    epsilon_of_counts,
    epsilon_of_rates,
    one_run_bound,
)
from kr_fast.membership.statistics.curve import roc
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
    check_delta(where, delta)
    check_share(where, "level", level)
    scores, members = scored(where, scores, members)
    if strategy not in STRATEGIES:
        fail(where, "strategy", f"be one of {', '.join(STRATEGIES)}", strategy)
    if thresholds is not None:
        thresholds = as_numbers(where, "thresholds", thresholds).double().numpy()
        if thresholds.ndim != 1 or thresholds.size == 0 or np.isnan(thresholds).any():
            fail(where, "thresholds", "hold at least one, and no NaN", thresholds.tolist())
        return roc(scores, members).epsilon_at(thresholds, delta, level)
    if strategy == "bonferroni":
        return roc(scores, members).epsilon(delta, level)
    generator = torch.Generator().manual_seed(seed)
    error = (1 - level) if strategy == "split" else (1 - level) / 2
    splits = 1 if strategy == "split" else SPLITS
    bounds = sorted(_split(scores, members, generator, error, delta) for _ in range(splits))
    return bounds[(splits - 1) // 2]


def _split(scores: Tensor, members: Tensor, generator: torch.Generator, error: float, delta: float) -> float:
    """Choose on one half of members and of non-members, evaluate on the other."""
    half = torch.zeros_like(members)
    for side in (members, ~members):
        index = side.nonzero()[:, 0]
        half[index[torch.randperm(len(index), generator=generator)[: len(index) // 2]]] = True
    chosen_on, tested_on = half, ~half
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
    tp, fp = second.counts_at([threshold])
    return epsilon_of_counts(tp, second.positives, fp, second.negatives, error, delta)


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
    Raises: UserError naming the argument.
    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2,
        algorithm of appendix D.
    """
    where = "epsilon_one_run"
    check_delta(where, delta)
    check_share(where, "level", level)
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


def gaussian_mu(scores: Tensor, members: Tensor, *, level: float = 0.95) -> float:
    """A lower bound of mu if training is mu-Gaussian-DP, see :meth:`kr_fast.membership.Curve.gaussian_mu`.

    Args: ``scores`` and ``members`` as of :func:`kr_fast.membership.roc`; ``level``: of confidence in the bound.
    """
    check_share("gaussian_mu", "level", level)
    return roc(scores, members).gaussian_mu(level)
