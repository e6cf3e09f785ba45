"""The ROC of an attack: exact AUC, TPR at low FPR with intervals that mean what they say."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.inputs.pool import scored
from kr_fast.membership.statistics.auc_intervals import auc_interval
from kr_fast.membership.statistics.bounds import check_delta, count_grid, epsilon_of_counts, epsilon_of_rates
from kr_fast.membership.statistics.intervals import binomial_quantile, check_share, clopper_pearson
from kr_fast.ops.membership import roc as ops_roc
from kr_fast.runtime.errors import fail

# Below this many false positives the threshold itself is too uncertain for a single number.
LEAST_FALSE_POSITIVES = 10
FPRS = (0.1, 0.01, 0.001, 0.0001)
RULES = ("<=", "<", "interpolated")


@dataclasses.dataclass(frozen=True, repr=False)
class Curve:
    """The ROC of one attack on one target.

    ``tp[i]`` members and ``fp[i]`` non-members score at or above ``thresholds[i]``; thresholds are the distinct scores
    from high to low, so tied scores are one point.
    """

    thresholds: np.ndarray
    tp: np.ndarray
    fp: np.ndarray

    def __repr__(self) -> str:
        low, high = self.auc_interval()
        return (
            f"Curve(AUC {self.auc:.3f}, 95 % interval [{low:.3f}, {high:.3f}]; {self.positives} members, "
            f"{self.negatives} non-members)"
        )

    def plot(self, axes: Any = None, label: str | None = None) -> Any:
        """Draw the ROC on logarithmic axes with the chance line.

        Args:
            axes: matplotlib axes to draw on, so that several curves share them; None for a new figure.
            label: of the curve in the legend; None for its AUC.
        Returns: the axes.
        """
        from kr_fast.report.plots import draw_roc

        return draw_roc(self.fpr, self.tpr, self.negatives, f"AUC {self.auc:.3f}" if label is None else label, axes)

    @property
    def positives(self) -> int:
        """Members."""
        return int(self.tp[-1])

    @property
    def negatives(self) -> int:
        """Non-members."""
        return int(self.fp[-1])

    @property
    def tpr(self) -> np.ndarray:
        """True-positive rates, from (0, 0) on."""
        return np.concatenate([[0.0], self.tp / self.positives])

    @property
    def fpr(self) -> np.ndarray:
        """False-positive rates, from (0, 0) on."""
        return np.concatenate([[0.0], self.fp / self.negatives])

    @functools.cached_property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Members and non-members at each distinct score."""
        return np.diff(self.tp, prepend=0), np.diff(self.fp, prepend=0)

    @functools.cached_property
    def auc(self) -> float:
        """P(member above non-member) + P(tie) / 2, counted in integers: one division, no rounding before it."""
        inside, outside = self.groups
        above = self.tp - inside  # members strictly above the group
        twice = int((outside * (2 * above + inside)).sum())
        return twice / (2 * self.positives * self.negatives)

    def auc_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of the AUC: by scores, so that it holds for few members too, see :func:`auc_interval`."""
        check_share("Curve", "level", level)
        return auc_interval(*self.groups, self.auc, level)

    @functools.cached_property
    def balanced_accuracy(self) -> float:
        """Largest ``(TPR + 1 - FPR) / 2`` over all thresholds. Optimistic: the threshold is chosen on the same data."""
        return float(np.max((self.tpr + 1 - self.fpr) / 2))

    @property
    def advantage(self) -> float:
        """Largest ``TPR - FPR`` (Yeom et al., CSF 2018): ``2 balanced_accuracy - 1``, as optimistic."""
        return 2 * self.balanced_accuracy - 1

    def tpr_at(self, fpr: float, level: float = 0.95, rule: str = "<=") -> dict[str, Any]:
        """The TPR at a false-positive rate, with an interval that accounts for the chosen threshold.

        Rules: "<=" the largest TPR whose realised FPR is at most ``fpr`` (default); "<" whose realised FPR is below it
        (the code of LiRA); "interpolated" on the line between the two points around it. The interval does not depend on
        the rule: it covers the TPR at the threshold whose *true* FPR is ``fpr``, see :meth:`tpr_interval`.

        Returns: {"tpr", "fpr" (realised), "false_positives", "rule", "interval": [low, high], "point_claim": bool}.
            ``point_claim`` is False below 10 false positives: quote the interval only.
        Raises: UserError for a rate or ``level`` outside (0, 1), or another rule.
        """
        check_share("Curve", "fpr", fpr)
        if rule not in RULES:
            fail("Curve", "rule", f"be one of {', '.join(RULES)}", rule)
        # A target rate times a count should be an integer where it is one on paper.
        allowed = fpr * self.negatives + (-1e-9 if rule == "<" else 1e-9)
        at = int(np.searchsorted(self.fp, allowed, side="right"))
        tp, fp = (int(self.tp[at - 1]), int(self.fp[at - 1])) if at else (0, 0)
        low, high = self.tpr_interval([fpr], level)
        rate = float(np.interp(fpr, self.fpr, self.tpr)) if rule == "interpolated" else tp / self.positives
        return {
            "tpr": rate,
            "fpr": fp / self.negatives,
            "false_positives": fp,
            "rule": "interpolated" if rule == "interpolated" else f"fpr {rule} target",
            "interval": [float(low[0]), float(high[0])],
            "point_claim": fp >= LEAST_FALSE_POSITIVES,
        }

    def tpr_interval(self, fpr: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the TPR at the thresholds whose *true* FPR is ``fpr``, each at ``level`` by itself.

        Such a threshold lies between two observed ones (order statistics of the non-members: a binomial interval for
        their count above it), and the TPR there has a Clopper-Pearson interval; each gets half of the error, so the
        whole covers at least ``level``. Clopper-Pearson at the observed threshold alone is about 2.4 times too narrow.
        """
        check_share("Curve", "level", level)
        fpr = np.asarray(fpr, dtype=np.float64)
        error = (1 - level) / 2
        fewest = binomial_quantile(error / 2, self.negatives, fpr)
        most = binomial_quantile(1 - error / 2, self.negatives, fpr)
        low = clopper_pearson(self.members_above(fewest - 1), self.positives, error / 2)[0]
        high = clopper_pearson(self.members_above(most), self.positives, error / 2)[1]
        return low, high

    def members_above(self, false_positives: np.ndarray) -> np.ndarray:
        """Members that can be had with at most this many false positives."""
        at = np.searchsorted(self.fp, false_positives, side="right")
        return np.concatenate([[0], self.tp])[at]

    def counts_at(self, thresholds: float | Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(members, non-members) that score at or above each threshold."""
        at = np.searchsorted(-self.thresholds, -np.asarray(thresholds, dtype=np.float64), side="right")
        return np.concatenate([[0], self.tp])[at], np.concatenate([[0], self.fp])[at]

    def threshold_at(self, fpr: float) -> float:
        """The least threshold at which the realised FPR is at most ``fpr``; above all scores where none is.

        Raises: UserError for such a threshold above a score of +inf.
        """
        check_share("Curve", "fpr", fpr)
        at = int(np.searchsorted(self.fp, fpr * self.negatives + 1e-9, side="right"))
        if not at and self.thresholds[0] == np.inf:
            fail("Curve", "scores", f"be finite for a threshold of an FPR of at most {fpr:g}", f"{self.fp[0]} +inf")
        return float(self.thresholds[at - 1]) if at else float(np.nextafter(self.thresholds[0], np.inf))

    def simultaneous_rates(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """(lower bounds of TPR, upper bounds of FPR) that hold together for all thresholds.

        See "bonferroni" of :func:`kr_fast.membership.epsilon_clopper_pearson`.
        """
        check_share("Curve", "level", level)
        counts = count_grid(self.negatives)[:-1]  # with all non-members flagged nothing is learnt
        error = (1 - level) / 2 / len(counts)
        low = clopper_pearson(self.members_above(counts), self.positives, error)[0]
        return low, clopper_pearson(counts, self.negatives, error)[1]

    def epsilon(self, delta: float = 0.0, level: float = 0.95) -> float:
        """A lower bound of epsilon at ``level``, for the best of all thresholds: :meth:`simultaneous_rates`."""
        check_delta("Curve", delta)
        return float(epsilon_of_rates(*self.simultaneous_rates(level), delta).max())

    def epsilon_at(self, thresholds: Sequence[float] | np.ndarray, delta: float = 0.0, level: float = 0.95) -> float:
        """A lower bound of epsilon at ``level`` from thresholds fixed without these data, which share the error."""
        check_delta("Curve", delta)
        check_share("Curve", "level", level)
        tp, fp = self.counts_at(thresholds)
        return epsilon_of_counts(tp, self.positives, fp, self.negatives, 1 - level, delta)

    def gaussian_mu(self, level: float = 0.95) -> float:
        """A lower bound of mu if training is mu-Gaussian-DP: ``Phi^-1(TPR) - Phi^-1(FPR)`` at its largest, at least 0.

        TPR and FPR are bounded for all thresholds together, as in :meth:`epsilon`. It says something of epsilon only
        for a mechanism that *is* Gaussian; then it is far tighter, for the best threshold for mu lies where there are
        many examples.
        Source: Dong, Roth and Su, "Gaussian Differential Privacy", JRSS B 2022; Nasr et al., USENIX Security 2023.
        """
        from scipy.special import ndtri

        low, high = self.simultaneous_rates(level)
        mu = np.where((low > 0) & (high < 1), ndtri(np.clip(low, 1e-300, 1)) - ndtri(np.clip(high, 0, 1 - 1e-16)), 0.0)
        return float(max(0.0, mu.max()))

    def precision(self, prior: float, fpr: float, level: float = 0.95) -> dict[str, Any]:
        """Share of true members among the flagged (PPV) if a share ``prior`` of the population are members.

        ``prior TPR / (prior TPR + (1 - prior) FPR)`` at the threshold of :meth:`tpr_at`, whose realised FPR is taken.
        The interval is that of the TPR at the *stated* FPR. None where nothing is flagged.
        """
        check_share("Curve", "prior", prior)
        point = self.tpr_at(fpr, level)
        low, high = (prior * tpr / (prior * tpr + (1 - prior) * fpr) for tpr in point["interval"])
        flagged = prior * point["tpr"] + (1 - prior) * point["fpr"]
        return {
            "prior": prior,
            "fpr": fpr,
            "ppv": prior * point["tpr"] / flagged if flagged else None,
            "interval": [low, high],
            "point_claim": point["point_claim"],
        }


def roc(scores: Tensor, members: Tensor) -> Curve:
    """The exact ROC of ``scores`` (``[N]``, higher for members) against ``members`` (bool ``[N]``).

    Tensors, arrays and lists are taken, members of 0 and 1 too.

    Raises: ValueError naming the argument; NaN and one class only are refused.
    """
    return Curve(*(values.numpy() for values in ops_roc.roc(*scored("roc", scores, members))))
