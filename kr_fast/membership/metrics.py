"""Statistics of an attack: exact AUC, TPR at low FPR with intervals that mean what they say."""

import dataclasses
import functools

import numpy as np
from torch import Tensor

from kr_fast.ops import roc as ops_roc
from kr_fast.runtime.errors import fail

# Below this many false positives the threshold itself is too uncertain for a single number.
LEAST_FALSE_POSITIVES = 10


@dataclasses.dataclass(frozen=True)
class Curve:
    """The ROC of one attack on one target.

    ``tp[i]`` members and ``fp[i]`` non-members score at or above ``thresholds[i]``; thresholds are the distinct scores
    from high to low, so tied scores are one point.
    """

    thresholds: np.ndarray
    tp: np.ndarray
    fp: np.ndarray

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
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Members and non-members at each distinct score."""
        return np.diff(self.tp, prepend=0), np.diff(self.fp, prepend=0)

    @functools.cached_property
    def auc(self) -> float:
        """P(member above non-member) + P(tie) / 2, counted in integers: one division, no rounding before it."""
        inside, outside = self._groups
        above = self.tp - inside  # members strictly above the group
        twice = int((outside * (2 * above + inside)).sum())
        return twice / (2 * self.positives * self.negatives)

    def auc_interval(self, level: float = 0.95) -> tuple[float, float]:
        """DeLong's interval of the AUC (DeLong, DeLong and Clarke-Pearson, Biometrics 1988), clipped to [0, 1].

        Where members and non-members do not overlap at all its variance is 0. Then the interval is Clopper-Pearson's
        for ``min(P, N)`` disjoint pairs that are all in order, or all out of it.
        """
        from scipy.special import ndtri

        if self.auc in (0.0, 1.0):
            least = ((1 - level) / 2) ** (1 / min(self.positives, self.negatives))
            return (least, 1.0) if self.auc == 1 else (0.0, 1 - least)
        inside, outside = self._groups
        # Share of non-members below a member of this group, and of members above a non-member; ties count half.
        of_member = 1 - (self.fp - outside / 2) / self.negatives
        of_other = (self.tp - inside / 2) / self.positives
        spread = sum(
            float((count * (value - self.auc) ** 2).sum()) / max(total - 1, 1) / total
            for count, value, total in ((inside, of_member, self.positives), (outside, of_other, self.negatives))
        )
        reach = float(ndtri(0.5 + level / 2)) * spread**0.5
        return max(0.0, self.auc - reach), min(1.0, self.auc + reach)

    @property
    def balanced_accuracy(self) -> float:
        """Largest ``(TPR + 1 - FPR) / 2`` over all thresholds. Optimistic: the threshold is chosen on the same data."""
        return float(np.max((self.tpr + 1 - self.fpr) / 2))

    def tpr_at(self, fpr: float, level: float = 0.95) -> dict:
        """The largest TPR whose realised FPR is at most ``fpr``.

        The interval covers the TPR at the threshold whose *true* FPR is ``fpr``. That threshold lies between two
        observed ones (order statistics of the non-members: a binomial interval for their count above it), and the TPR
        there has a Clopper-Pearson interval; each gets half of the error, so the whole covers at least ``level``.

        Returns: {"tpr", "fpr" (realised), "false_positives", "rule": "fpr <= target", "interval": [low, high],
            "point_claim": bool}. ``point_claim`` is False below 10 false positives: quote the interval only.
        """
        from scipy.stats import beta, binom

        if not 0 < fpr < 1:
            fail("Curve", "fpr", "be in (0, 1)", fpr)
        at = int(np.searchsorted(self.fp, fpr * self.negatives + 1e-9, side="right"))
        tp, fp = (int(self.tp[at - 1]), int(self.fp[at - 1])) if at else (0, 0)
        error = (1 - level) / 2
        fewest = int(binom.ppf(error / 2, self.negatives, fpr))
        most = int(binom.ppf(1 - error / 2, self.negatives, fpr))
        low_tp = self._members_above(fewest - 1)
        high_tp = self._members_above(most)
        low = float(beta.ppf(error / 2, low_tp, self.positives - low_tp + 1)) if low_tp > 0 else 0.0
        high = 1.0
        if high_tp < self.positives:
            high = float(beta.ppf(1 - error / 2, high_tp + 1, self.positives - high_tp))
        return {
            "tpr": tp / self.positives,
            "fpr": fp / self.negatives,
            "false_positives": fp,
            "rule": "fpr <= target",
            "interval": [low, high],
            "point_claim": fp >= LEAST_FALSE_POSITIVES,
        }

    def _members_above(self, false_positives: int) -> int:
        """Members that can be had with at most this many false positives."""
        at = int(np.searchsorted(self.fp, false_positives, side="right"))
        return int(self.tp[at - 1]) if at else 0


def roc(scores: Tensor, members: Tensor) -> Curve:
    """The exact ROC of ``scores`` (``[N]``, higher for members) against ``members`` (bool ``[N]``).

    Raises: TypeError or ValueError naming the argument; NaN and one class only are refused.
    """
    return Curve(*(values.numpy() for values in ops_roc.roc(scores, members)))


def aop(accuracy: float, auc: float) -> float:
    """Accuracy over privacy: ``accuracy / (2 max(auc, 1/2))^2`` (Rinaldi et al., "DAP", BMVC 2023).

    It equals the accuracy where the attack is at chance and falls to a quarter of it where the attack is perfect. One
    number hides both: read it beside them.
    """
    return accuracy / (2 * max(auc, 0.5)) ** 2
