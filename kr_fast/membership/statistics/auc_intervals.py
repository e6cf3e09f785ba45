"""The interval of an AUC, and the paired test of two on the same examples, for few members as for many.

DeLong's variance is estimated from the placements: with three members it rests on three numbers, and its interval holds
0.5 in 78 % of null simulations. But the variance that *chance* gives is known without data. Both are used: beside the
``k - 1`` degrees of freedom of a side, the variance of a model counts as :data:`PRIOR` more. With many examples that
leaves DeLong's.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.inputs.pool import scored
from kr_fast.membership.statistics.intervals import check_share, normal_quantile
from kr_fast.membership.statistics.permutation import upper_tail

PRIOR = 10  # degrees of freedom that the model's variance counts as, by simulation: docs/audit/intervals.md
HALVINGS = 50
MOST_WAYS = 5000  # in which examples can be drawn, for the exact permutation test


def model_variance(auc: float) -> float:
    """Variance of a placement if the AUC is ``auc``: ``(Q1 + Q2) / 2 - auc^2``; 1/12 at one half, as chance has it.

    ``Q1 = auc / (2 - auc)``, ``Q2 = 2 auc^2 / (1 + auc)``. Source: Hanley and McNeil, Radiology 1982; the mean of both
    sides for each of them: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5.
    """
    return (auc / (2 - auc) + 2 * auc * auc / (1 + auc)) / 2 - auc * auc


def auc_interval(inside: np.ndarray, outside: np.ndarray, auc: float, level: float = 0.95) -> tuple[float, float]:
    """The AUCs that a test at ``1 - level`` does not refute, in [0, 1]; never more than half of the error on a side.

    A score interval: the ends solve ``|auc - t| = z sqrt(V(t))`` with

        ``V(t) = v_in(t) / P + v_out(t) / N + c (t (1 - t) - 2 h(t)) / (P N)``
        ``v(t) = (PRIOR c h(t) + (k - 1) s^2 t (1 - t) / (auc (1 - auc))) / (PRIOR + k - 1)``, k = P or N,

    where ``h`` is :func:`model_variance`, ``c`` the share of a rank's variance that ties leave (so the model's part is
    exact for scores that know nothing), and ``s^2`` the placements' variance, carried over to ``t`` as that of a
    binomial. Besides, 0.5 is left outside only if the permutation test refutes it on that side, see
    :func:`chance_above`: where few examples are flagged V is short, and its normal curve is not skewed as chance is.

    Where members and non-members do not overlap at all, the interval is Clopper-Pearson's for ``min(P, N)`` disjoint
    pairs that are all in order, or all out of it.

    Args:
        inside, outside: members and non-members at each distinct score, from high to low.
        auc: that of these counts.
    Source: the score form with a binomial's variance: Halperin, Gilbert and Lachin, Biometrics 43 (1987); ``h``:
        Newcombe 2006 as above; a variance shrunk to a model's: Smyth, Statistical Applications in Genetics and
        Molecular Biology 3 (2004); ``s^2``: DeLong, DeLong and Clarke-Pearson, Biometrics 1988.
    """
    inside, outside = inside.astype(np.float64), outside.astype(np.float64)
    p, n = int(inside.sum()), int(outside.sum())
    if auc in (0.0, 1.0):
        least = ((1 - level) / 2) ** (1 / min(p, n))
        return (least, 1.0) if auc == 1 else (0.0, 1 - least)
    # Share of non-members below a member of this group, and of members above a non-member; ties count half.
    of_member = 1 - (outside.cumsum() - outside / 2) / n
    of_other = (inside.cumsum() - inside / 2) / p
    sides = ((inside, of_member - auc), (outside, of_other - auc))
    squares = [float(count @ (gap * gap)) / (auc * (1 - auc)) for count, gap in sides]
    share = chance_moments(inside, outside)[0]

    def variance(t: float) -> float:
        model, scale = share * model_variance(t), t * (1 - t)
        sides = zip(squares, (p, n), strict=True)
        total = sum((PRIOR * model + square * scale) / (PRIOR + k - 1) / k for square, k in sides)
        return total + (share * scale - 2 * model) / (p * n)

    z = normal_quantile(0.5 + level / 2)
    low = _boundary(lambda t: (auc - t) ** 2 > z * z * variance(t), 0.0, auc)
    high = _boundary(lambda t: (auc - t) ** 2 > z * z * variance(t), 1.0, auc)
    above, error = chance_above(inside, outside, auc), (1 - level) / 2
    low, high = low if above <= error else min(low, 0.5), high if 1 - above <= error else max(high, 0.5)
    return low, high


def chance_moments(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    """(share of a rank's variance that ties leave, standard deviation, skewness) of the AUC if members are any ``P``.

    Exact moments of the mean of ``P`` of the ``P + N`` midranks, drawn without replacement.
    """
    counts = (inside + outside).astype(np.float64)
    p, n = int(inside.sum()), int(outside.sum())
    total = p + n
    ranks = counts.cumsum() - counts / 2 - total / 2  # from the mean; from high to low
    squares = ranks * ranks
    second, third = float(counts @ squares) / total, -float(counts @ (squares * ranks)) / total
    if second == 0:
        return 0.0, 0.0, 0.0
    skewness = 0.0
    if total > 2:
        skewness = (n - p) * (total - 1) ** 0.5 / ((total - 2) * (p * n) ** 0.5) * third / second**1.5
    return second * 12 / (total * total - 1), (second / ((total - 1) * p * n)) ** 0.5, skewness


def chance_above(inside: np.ndarray, outside: np.ndarray, auc: float) -> float:
    """Probability that any ``P`` of the examples as members give a larger AUC, and half of that of the same AUC.

    Exact where so many scores are tied that there are few ways to draw the smaller side; else by the curve of the exact
    mean, variance and skewness (Pearson III). Source of both: Mielke and Berry, "Permutation Methods" (2007); the half
    (mid-p): Lancaster, JASA 56 (1961).
    """
    if (exact := _exact_above(inside, outside)) is not None:
        return exact
    _, deviation, skewness = chance_moments(inside, outside)
    return 0.5 if deviation == 0 else upper_tail((auc - 0.5) / deviation, skewness)


def _exact_above(inside: np.ndarray, outside: np.ndarray) -> float | None:
    """The probability by all ways to draw the smaller side, or None where there are more than :data:`MOST_WAYS`."""
    from scipy.special import gammaln

    counts, few = inside + outside, inside if inside.sum() <= outside.sum() else outside
    drawn, groups = int(few.sum()), len(counts)
    if groups > 64 or math.comb(drawn + groups - 1, groups - 1) > MOST_WAYS:
        return None
    values = counts.sum() - 2 * counts.cumsum() + counts  # twice the midrank, from its mean; whole numbers
    taken, sums, logs = np.zeros(1), np.zeros(1), np.zeros(1)
    for count, value in zip(counts, values, strict=True):
        last = value == values[-1]
        more = np.arange(min(drawn, int(count)) + 1)[:, None]
        ways = gammaln(count + 1) - gammaln(more + 1) - gammaln(count - more + 1)
        taken, sums, logs = ((each + new).ravel() for each, new in ((taken, more), (sums, more * value), (logs, ways)))
        usable = taken == drawn if last else taken <= drawn
        taken, sums, logs = taken[usable], sums[usable], logs[usable]
    weights = np.exp(logs - logs.max())
    observed = float(few @ values)
    share = float(weights @ np.where(sums > observed, 1.0, np.where(sums == observed, 0.5, 0.0))) / float(weights.sum())
    return share if few is inside else 1 - share


def _boundary(refuted: Callable[[float], bool], outer: float, inner: float) -> float:
    """Where ``refuted`` ends between ``outer``, which is, and ``inner``, which is not."""
    for _ in range(HALVINGS):
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if refuted(middle) else (outer, middle)
    return outer


def chance_range(members: int, non_members: int, level: float = 0.95) -> tuple[float, float]:
    """The AUCs that scores which know nothing (and do not tie) reach in ``level`` of all cases."""
    deviation = ((members + non_members + 1) / (12 * members * non_members)) ** 0.5
    reach = normal_quantile(0.5 + level / 2) * deviation
    return max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)


def placements(scores: Tensor, members: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(share of non-members below each member, share of members above each non-member, midranks of all of both)."""
    values, inside = scores.double().numpy() + 0.0, members.numpy()
    high, low = np.sort(values[inside]), np.sort(values[~inside])
    below = [np.searchsorted(low, values, side) for side in ("left", "right")]
    above = [np.searchsorted(high, values, side) for side in ("left", "right")]
    midranks = (sum(below) + sum(above)) / 2
    return sum(below)[inside] / (2 * len(low)), 1 - sum(above)[~inside] / (2 * len(high)), midranks


def delong_test(first: Tensor, second: Tensor, members: Tensor, level: float = 0.95) -> dict[str, Any]:
    """Paired test: is the AUC of ``first`` another than that of ``second`` on the same examples?

    ``z = difference / sqrt(V)``, ``V = v_in / P + v_out / N`` as DeLong has it, from the differences of the two
    placements of each example; but beside the ``k - 1`` degrees of freedom of a side, ``c h`` counts as :data:`PRIOR`
    more, where ``h`` is :func:`model_variance` at the mean of both AUCs and ``c`` the variance of the differences of
    ranks as a share of that of ranks: what V is if no attack tells members. Student's t with Satterthwaite's degrees of
    freedom gives p, and the same statistic turned round the interval: it holds 0 exactly if ``p >= 1 - level``.

    Args:
        first, second: scores ``[N]`` of two targets (Teacher, Student) or two attacks.
        members: bool ``[N]``, of both; all three as tensors, arrays or lists.
    Returns: {"difference", "interval", "z", "p" (two-sided)}; z and p are None where the difference has no variance.
    Raises: UserError naming the argument.
    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 1988; Sun and Xu, IEEE SPL 2014; the moderated t: Smyth,
        Statistical Applications in Genetics and Molecular Biology 3 (2004).
    """
    check_share("delong_test", "level", level)
    difference, parts, degrees = delong_variances(first, second, members)
    return {"difference": difference, **t_interval(difference, parts, degrees, level)}


def delong_variances(first: Tensor, second: Tensor, members: Tensor) -> tuple[float, list[float], list[int]]:
    """(difference, variance of each side, their degrees of freedom) of :func:`delong_test`, for :func:`t_interval`."""
    first, members = scored("delong_test", first, members, "first")
    second, members = scored("delong_test", second, members, "second")
    one, two = placements(first, members), placements(second, members)
    difference = float(one[0].mean() - two[0].mean())
    share = float(np.mean((one[2] - two[2]) ** 2)) * 12 / (len(members) ** 2 - 1)
    model = share * model_variance(float(one[0].mean() + two[0].mean()) / 2)
    parts, degrees = [], []
    for gap in (one[0] - two[0], one[1] - two[1]):
        degrees.append(PRIOR + len(gap) - 1)
        parts.append((PRIOR * model + float(((gap - gap.mean()) ** 2).sum())) / degrees[-1] / len(gap))
    return difference, parts, degrees


def t_interval(difference: float, parts: list[float], degrees: list[int], level: float) -> dict[str, Any]:
    """{"interval", "z", "p"} of a difference whose variance is the sum of ``parts``."""
    from scipy.special import stdtr, stdtrit

    variance = sum(parts)
    # Two orders that agree on every pair leave rounding only.
    if variance <= 1e-30:
        return {"interval": [difference, difference], "z": None, "p": None}
    freedom = satterthwaite(parts, degrees)
    reach, z = float(stdtrit(freedom, 0.5 + level / 2)) * variance**0.5, difference / variance**0.5
    return {"interval": [difference - reach, difference + reach], "z": z, "p": float(2 * stdtr(freedom, -abs(z)))}


def satterthwaite(parts: list[float], degrees: list[int]) -> float:
    """Degrees of freedom of a sum of variances (Satterthwaite, Biometrics Bulletin 2 (1946))."""
    return sum(parts) ** 2 / sum(part**2 / k for part, k in zip(parts, degrees, strict=True))
