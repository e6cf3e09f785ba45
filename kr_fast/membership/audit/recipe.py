"""What a training recipe leaks: figures averaged over models made by it, with intervals over models and records.

One model is one draw: its AUC moves with the seed and the processor. The shadows are as many draws, and each is
attacked from the others. Their AUCs are no independent ones, for all are on the same records.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.statistics.auc_intervals import satterthwaite, t_interval
from kr_fast.membership.statistics.curve import FPRS, Curve, roc
from kr_fast.membership.statistics.groups import Groups
from kr_fast.membership.statistics.intervals import check_share, holm
from kr_fast.membership.statistics.summaries import matrices


@dataclasses.dataclass(frozen=True)
class Estimates:
    """A figure of each of K targets, and what each record adds to it.

    ``each [K]``; ``parts [K, N]``, whose mean over records is the error of the estimate to first order; ``pairs``: of
    an AUC, how many disjoint pairs of a member and a non-member each target has at least.
    """

    each: np.ndarray
    parts: np.ndarray
    pairs: int = 0

    def __sub__(self, other: "Estimates") -> "Estimates":
        return dataclasses.replace(self, each=self.each - other.each, parts=self.parts - other.parts)

    def by(self, groups: Groups | None) -> "Estimates":
        """The same with what each group of records adds, so that whole groups are the units of intervals."""
        if groups is None:
            return self
        sums = groups.mean(torch.from_numpy(self.parts)) * groups.sizes
        pairs = min(self.pairs, len(groups.names) // 2)
        return Estimates(self.each, sums.numpy() * (len(groups.names) / self.parts.shape[1]), pairs)

    @property
    def mean(self) -> float:
        """Over the targets."""
        return float(self.each.mean())

    def variances(self) -> tuple[list[float], list[int]]:
        """Parts of the mean's variance, of records and of models, and their degrees of freedom.

        Records: that of the parts' mean over targets, record by record, so that what a record adds as a member of some
        targets and as a non-member of others cancels (Obuchowski, Biometrics 53 (1997), with records as clusters).
        Models: the spread of the K figures beyond what records explain, ``max(0, s^2 - (w - c)) / K``, where ``w`` is
        the mean variance of a single figure by its records and ``c`` the mean covariance of two, as records give them
        (DerSimonian and Laird, Controlled Clinical Trials 7 (1986), for figures that are correlated).
        """
        targets, count = self.parts.shape
        # Exact sums: the order of the records must not show in a digit.
        records = math.fsum(self.parts.mean(0) ** 2) / count**2
        if targets == 1:
            return [records], [max(count - 1, 1)]
        within = math.fsum((self.parts**2).mean(0)) / count**2
        shared = (targets * records - within) / (targets - 1)
        models = max(0.0, float(self.each.var(ddof=1)) - (within - shared)) / targets
        return [records, models], [max(count - 1, 1), targets - 1]

    def interval(self, level: float) -> list[float] | None:
        """Wilson's interval of the mean at the number of trials that has its variance, by Student's t; None for none.

        Where members and non-members of no target overlap, which leaves no variance, it is Clopper-Pearson's for the
        pairs of one of them, as of :func:`auc_interval`: the others are on the same records.

        Source: Wilson, JASA 22 (1927); effective numbers of trials and degrees of freedom: Korn and Graubard, Survey
        Methodology 24 (1998).
        """
        from scipy.special import stdtrit

        if self.pairs and self.mean in (0.0, 1.0):
            least = ((1 - level) / 2) ** (1 / self.pairs)
            return [least, 1.0] if self.mean == 1 else [0.0, 1 - least]
        parts, degrees = self.variances()
        if not 0 < self.mean < 1 or sum(parts) <= 1e-30:
            return None
        square = float(stdtrit(satterthwaite(parts, degrees), 0.5 + level / 2)) ** 2 / (
            self.mean * (1 - self.mean) / sum(parts)
        )
        centre = (self.mean + square / 2) / (1 + square)
        reach = (square * self.mean * (1 - self.mean) + square * square / 4) ** 0.5 / (1 + square)
        return [centre - reach, centre + reach]

    def summary(self, level: float) -> dict[str, Any]:
        """{"mean", "sd" (of models), "each", "interval" (of the mean)}."""
        sd = float(self.each.std(ddof=1)) if len(self.each) > 1 else None
        return {"mean": self.mean, "sd": sd, "each": self.each.tolist(), "interval": self.interval(level)}


@dataclasses.dataclass(frozen=True)
class OfGroups(Estimates):
    """The AUC of one target with groups of records as units, of which one side may have few.

    ``parts [2, G]``: what each group adds by its members, and by its non-members; ``counts``: groups with some of each.
    """

    counts: tuple[int, int] = (0, 0)

    def variances(self) -> tuple[list[float], list[int]]:
        """Parts of the variance, of member groups and of others, and degrees of freedom, those of the smaller side.

        (Each by its own they would be too many where a few groups happen to lie close together.) Groups on both sides
        share out the covariance of their two parts. One group tells nothing of the spread of groups: it has the largest
        that a share in [0, 1] can have, with one degree of freedom.
        """
        squares = (self.parts**2).sum(1)
        whole = float((self.parts.sum(0) ** 2).sum() / max(squares.sum(), 1e-300))
        sides = zip((whole * squares).tolist(), self.counts, strict=True)
        parts = [square * count / (count - 1) if count > 1 else 0.25 for square, count in sides]
        return parts, [max(min(self.counts) - 1, 1)] * 2


def across_targets(scores: Tensor, keep: Tensor, fprs: Sequence[float] = FPRS, level: float = 0.95) -> dict[str, Any]:
    """AUC and TPRs of several targets: mean, its interval, and standard deviation.

    Targets that are attacked leave-one-out share their shadows and records, so ``sd`` is the spread of models and no
    standard error; ``interval`` is that of the mean, over other models and other records, see
    :meth:`Estimates.variances`. It is None where there is no spread to tell it from.

    Args:
        scores: ``[K, N]``, of any attack.
        keep: bool ``[K, N]``, the members of each target.
        fprs: false-positive rates of the TPRs; one that rests on fewer than ten false positives of a target is None.
        level: coverage of the intervals.
    Returns: {"targets", "auc": {"mean", "sd", "each", "interval"}, "balanced_accuracy": {"mean", "sd", "each"},
        "tpr_at_fpr": {fpr: {"mean", "sd", "each", "interval"}}}.
    """
    check_share("across_targets", "level", level)
    return _figures(_curves(*matrices("across_targets", scores, keep)), fprs, level, None)[0]


Targets = tuple[list[Curve], np.ndarray, np.ndarray]  # curves, scores [K, N], keep [K, N]


def _curves(scores: Tensor, keep: Tensor) -> Targets:
    curves = [roc(row, members) for row, members in zip(scores, keep, strict=True)]
    return curves, scores.double().numpy(), keep.numpy()


def _figures(
    targets: Targets, fprs: Sequence[float], level: float, groups: Groups | None
) -> tuple[dict[str, Any], Estimates]:
    """What :func:`across_targets` returns, and the estimates of the AUC."""
    curves, scores, keep = targets
    estimates = aucs(curves, scores, keep).by(groups)
    balanced = Estimates(np.array([curve.balanced_accuracy for curve in curves]), np.zeros((len(curves), 1)))
    return {
        "targets": len(curves),
        "auc": estimates.summary(level),
        "balanced_accuracy": {key: balanced.summary(level)[key] for key in ("mean", "sd", "each")},
        "tpr_at_fpr": {str(fpr): _tprs(targets, fpr, level, groups) for fpr in fprs},
    }, estimates


def aucs(curves: Sequence[Curve], scores: np.ndarray, keep: np.ndarray) -> Estimates:
    """AUC of each target; a record's part is its placement among the other side, less the AUC."""
    parts = np.empty(scores.shape)
    for k, curve in enumerate(curves):
        inside, outside = curve.groups
        group = np.searchsorted(-curve.thresholds, -scores[k])
        of_member = 1 - (curve.fp - outside / 2)[group] / curve.negatives
        of_other = (curve.tp - inside / 2)[group] / curve.positives
        parts[k] = np.where(keep[k], of_member, of_other) - curve.auc
    pairs = min(min(curve.positives, curve.negatives) for curve in curves)
    return Estimates(np.array([curve.auc for curve in curves]), parts * _weights(curves, keep), pairs)


def _weights(curves: Sequence[Curve], keep: np.ndarray) -> np.ndarray:
    """``N / k`` of an example on a side of k, and the root of ``k / (k - 1)`` for the mean that was taken off."""
    count, rows = keep.shape[1], []
    for k, curve in enumerate(curves):
        sizes = [count / size * (size / max(size - 1, 1)) ** 0.5 for size in (curve.positives, curve.negatives)]
        rows.append(np.where(keep[k], *sizes))
    return np.stack(rows)


def of_target(curve: Curve, scores: Tensor, members: Tensor, groups: Groups | None = None) -> Estimates:
    """The AUC of one target, and what each record, or each group of records, adds to it."""
    estimates = aucs([curve], scores.double().numpy()[None], members.numpy()[None])
    if groups is None:
        return estimates
    sides = torch.stack([members, ~members])
    sizes = sides.sum(1, keepdim=True)
    sums = groups.mean(torch.from_numpy(estimates.parts) * sides) * groups.sizes / len(members)
    counts = (groups.mean(sides) > 0).sum(1).tolist()
    # Without the factor of records, see _weights: here it is one of groups.
    sums *= ((sizes - 1).clamp_min(1) / sizes).sqrt()
    return OfGroups(estimates.each, sums.numpy(), min(counts), tuple(counts))


def _tprs(targets: Targets, fpr: float, level: float, groups: Groups | None) -> dict[str, Any]:
    """TPR of each target; a non-member's part is its step of the FPR times the slope of the mean ROC."""
    curves, scores, keep = targets
    points = [curve.tpr_at(fpr, level) for curve in curves]
    claimed = [each["tpr"] if each["point_claim"] else None for each in points]
    if None in claimed:
        return {"mean": None, "sd": None, "each": claimed, "interval": None}
    near = [[curve.tpr_at(rate, level) for curve in curves] for rate in (fpr / 2, min(2 * fpr, (1 + fpr) / 2))]
    low, high = ([float(np.mean([each[key] for each in side])) for key in ("fpr", "tpr")] for side in near)
    slope = (high[1] - low[1]) / max(high[0] - low[0], 1e-300)
    parts = np.empty(scores.shape)
    for k, (curve, each) in enumerate(zip(curves, points, strict=True)):
        at = int(np.searchsorted(curve.fp, each["false_positives"], side="right")) - 1
        flagged = scores[k] >= curve.thresholds[at]
        parts[k] = np.where(keep[k], flagged - each["tpr"], -slope * (flagged - each["fpr"]))
    return Estimates(np.array(claimed), parts * _weights(curves, keep)).by(groups).summary(level)


def _gap(
    first: tuple[Estimates, np.ndarray], second: tuple[Estimates, np.ndarray], level: float, corrected_level: float
) -> dict[str, Any] | None:
    """Mean AUC of the first recipe minus that of the second over targets in pairs, or None where they are no pairs.

    Target k of both has the same members, as a shadow Student has those of its shadow Teacher; where there are more of
    one recipe, its first are taken.

    Args:
        first, second: (AUCs, keep ``[K, N]``).
    Returns: {"difference", "interval", "z", "p", "targets", "interval_corrected"}.
    """
    count = min(len(first[1]), len(second[1]))
    if first[1].shape[1] != second[1].shape[1] or not (first[1][:count] == second[1][:count]).all():
        return None
    one, two = (Estimates(estimates.each[:count], estimates.parts[:count]) for estimates, _ in (first, second))
    gap = one - two
    variances = gap.variances()
    test, corrected = (t_interval(gap.mean, *variances, each) for each in (level, corrected_level))
    return {"difference": gap.mean, **test, "targets": count, "interval_corrected": corrected["interval"]}


def recipes(
    lone: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], primary: str, level: float, groups: Groups | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Set of shadows -> attack -> :func:`across_targets`, role, corrected interval, and difference to the first set.

    The primary attack was named beforehand. The others of a set share one error: Bonferroni's intervals, Holm's p.

    Args:
        lone: set -> attack -> (scores, keep) of shadows, each attacked from the others.
        groups: of the records, the units of intervals then; None: records are.
    """
    rows_of: dict[str, dict[str, dict[str, Any]]] = {}
    of_first: dict[str, tuple[Estimates, np.ndarray]] = {}
    for name, each in lone.items():
        named = primary if primary in each else next(iter(each), None)
        shared, rows, gaps = 1 - (1 - level) / max(len(each) - 1, 1), {}, []
        for attack, pair in each.items():
            rows[attack], auc = _figures(_curves(*pair), FPRS, level, groups)
            wide = level if attack == named else shared
            rows[attack]["role"] = "primary" if attack == named else "exploratory"
            rows[attack]["auc"]["interval_corrected"] = auc.interval(wide)
            rows[attack]["difference"] = None
            mine = auc, pair[1].numpy()
            if not rows_of:
                of_first[attack] = mine
            elif attack in of_first and (gap := _gap(of_first[attack], mine, level, wide)) is not None:
                gap |= {"first": next(iter(rows_of)), "p_corrected": gap["p"]}
                rows[attack]["difference"] = gap
                gaps += [gap] if attack != named else []
        for gap, p in zip(gaps, holm([gap["p"] for gap in gaps]), strict=True):
            gap["p_corrected"] = p
        if rows:
            rows_of[name] = rows
    return rows_of
