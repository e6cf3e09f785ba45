"""What is said beside a curve: thresholds that never saw the target, accuracy over privacy."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers, check_accuracy
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.membership.statistics.intervals import check_share, clopper_pearson
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_mask


def matrices(where: str, scores: Any, keep: Any) -> tuple[Tensor, Tensor]:
    """(scores, members) ``[K, N]`` of K targets."""
    scores, keep = as_numbers(where, "scores", scores), as_mask(where, "keep", keep, 2)
    if scores.shape != keep.shape:
        fail(where, "scores", f"have shape {list(keep.shape)}, as keep", list(scores.shape))
    return scores, keep


def shadow_threshold(scores: Tensor, keep: Tensor, fpr: float) -> float:
    """The threshold at which non-members of the *shadows* are flagged at a rate of at most ``fpr``.

    It never saw the target: what it achieves there (:func:`operating_point`) is what an attacker would achieve.

    Args:
        scores: ``[M, N]``, each shadow attacked leave-one-out.
        keep: bool ``[M, N]``.
    """
    check_share("shadow_threshold", "fpr", fpr)
    scores, keep = matrices("shadow_threshold", scores, keep)
    return roc(scores.flatten(), keep.flatten()).threshold_at(fpr)


def operating_point(
    curve: Curve, threshold: float, priors: Sequence[float] = (0.5, 0.1, 0.01), level: float = 0.95
) -> dict[str, Any]:
    """TPR, FPR and PPV at a threshold that was fixed without the target, with Clopper-Pearson intervals.

    ``PPV = prior TPR / (prior TPR + (1 - prior) FPR)``; its interval takes both rates at their worst and best, each at
    half of the error.

    Args:
        curve: of the target, see :func:`kr_fast.membership.roc`.
        threshold: above which, or at, a score reads as member.
        priors: shares of members among those asked about.
        level: coverage of the intervals.
    Raises: UserError naming the argument.
    """
    for name, value in (("level", level), *(("priors", prior) for prior in priors)):
        check_share("operating_point", name, value)
    if not -math.inf <= threshold <= math.inf:
        fail("operating_point", "threshold", "be a number", threshold)
    tp, fp = map(int, curve.counts_at(threshold))
    error = (1 - level) / 2
    tpr = [float(v) for v in clopper_pearson(tp, curve.positives, error)]
    fpr = [float(v) for v in clopper_pearson(fp, curve.negatives, error)]
    worst, best = (
        (clopper_pearson(tp, curve.positives, error / 2)[i], clopper_pearson(fp, curve.negatives, error / 2)[1 - i])
        for i in (0, 1)
    )

    def ppv(prior: float, hit: float, miss: float) -> float | None:
        flagged = prior * hit + (1 - prior) * miss
        return float(prior * hit / flagged) if flagged else None

    return {
        "threshold": threshold,
        "tpr": tp / curve.positives,
        "tpr_interval": tpr,
        "fpr": fp / curve.negatives,
        "fpr_interval": fpr,
        "false_positives": fp,
        "ppv": {
            str(prior): {
                "ppv": ppv(prior, tp / curve.positives, fp / curve.negatives),
                "interval": [ppv(prior, *worst), ppv(prior, *best)],
            }
            for prior in priors
        },
    }


def aop(accuracy: float, auc: float) -> float:
    """Accuracy over privacy: ``accuracy / (2 max(auc, 1/2))^2`` (Rinaldi et al., "DAP", BMVC 2023).

    It equals the accuracy where the attack is at chance and falls to a quarter of it where the attack is perfect. One
    number hides both: read it beside them.

    Raises: UserError for an accuracy or AUC outside [0, 1].
    """
    accuracy, auc = check_accuracy("accuracy", accuracy, "aop"), check_accuracy("auc", auc, "aop")
    return accuracy / (2 * max(auc, 0.5)) ** 2
