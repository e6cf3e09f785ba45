"""The figures of one attack on one target, each with the interval that it needs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.statistics.bounds import epsilon_of_mu
from kr_fast.membership.statistics.curve import FPRS, Curve
from kr_fast.membership.statistics.summaries import aop, operating_point

THRESHOLD_FPRS = (0.1, 0.01, 0.001)


def describe(curve: Curve, level: float = 0.95, fprs: Sequence[float] = FPRS) -> dict[str, Any]:
    """AUC, TPR at low FPR, balanced accuracy and advantage of one curve. A TPR without a point claim is None."""
    tprs = {}
    for fpr in fprs:
        point = curve.tpr_at(fpr, level)
        tprs[str(fpr)] = point | {"tpr": point["tpr"] if point["point_claim"] else None}
    return {
        "auc": curve.auc,
        "auc_ci": list(curve.auc_interval(level)),
        "tpr_at_fpr": tprs,
        "balanced_accuracy": curve.balanced_accuracy,
        "advantage": curve.advantage,
    }


def of_attack(
    curve: Curve, choices: Choices, *, role: str, family: int, accuracy: float | None, calibration: Curve | None
) -> dict[str, Any]:
    """Everything that is said of one attack on one target, but for the one-run bound.

    Args:
        role: "primary" (named beforehand: figures at ``choices.level``) or "exploratory".
        family: how many exploratory attacks there are; each gets its share of the error, so that the largest of them
            may be looked at.
        calibration: of the same attack on all shadows, each attacked leave-one-out; or None.
    """
    level = choices.level if role == "primary" else 1 - (1 - choices.level) / max(family, 1)
    figures = describe(curve, choices.level)
    figures["role"] = role
    figures["auc_ci_corrected"] = list(curve.auc_interval(level))
    mu = curve.gaussian_mu(level)
    figures["epsilon"] = {
        "delta": choices.delta,
        "level": level,
        "clopper_pearson": curve.epsilon(choices.delta, level),
        "gaussian_mu": mu,
        "gaussian": epsilon_of_mu(mu, choices.delta),
        "one_run": None,
    }
    figures["operating_points"] = None
    if calibration is not None:
        figures["operating_points"] = {
            str(fpr): operating_point(curve, calibration.threshold_at(fpr), choices.priors, choices.level)
            for fpr in THRESHOLD_FPRS
        }
    if accuracy is not None:
        figures["aop"] = aop(accuracy, curve.auc)
    return figures


def exposed(scores: Tensor, members: Tensor, count: int) -> list[dict[str, Any]]:
    """The members that stand out most: position in the pool, score, and how many non-members score as high."""
    order = torch.argsort(torch.where(members, scores, -torch.inf), descending=True, stable=True)[:count]
    outside = np.sort(scores[~members].numpy())
    rows = []
    for index in order[members[order]].tolist():
        above = len(outside) - int(np.searchsorted(outside, float(scores[index]), "left"))
        rows.append({"position": index, "score": float(scores[index]), "non_members_above": above})
    return rows
