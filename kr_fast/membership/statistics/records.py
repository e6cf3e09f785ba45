"""The risk of each record: do the shadows that were trained on it answer it otherwise than those that were not?

An AUC over all records hides the few that are found almost surely. Here one record is tested at a time, over models:
its score in the shadows that held it against its score in those that did not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.inputs.answers import refuse_nan
from kr_fast.membership.statistics.auc_intervals import model_variance
from kr_fast.membership.statistics.intervals import benjamini_hochberg, check_share, holm_of_array, normal_quantile
from kr_fast.membership.statistics.summaries import matrices
from kr_fast.runtime.reprs import ShortRepr

LEAST_SHADOWS = 4  # of a record on each side; below that it is counted and not tested
MOST_PAIRS = 128 * 128  # of shadows, up to which the null distribution is exact
RATE = 0.1  # false discovery rate at which a record counts as found
POWER = 0.8
HALVINGS = 50
REPLICATES, MOST_DRAWS = 1000, 20_000_000


@dataclasses.dataclass(frozen=True, repr=False)
class RecordRisk(ShortRepr):
    """What :func:`record_risk` finds of N records, in their order. Untested ones hold NaN.

    Args:
        inside, outside: int64 ``[N]``, shadows that were and were not trained on the record.
        advantage: float64 ``[N]``, ``2 AUC - 1`` of the record, in [-1, 1]: how much more often a shadow that held it
            gives the higher score than one that did not, than the other way round (rank-biserial correlation).
        interval: float64 ``[N, 2]`` of the advantage.
        p: float64 ``[N]``, one-sided, exact.
        q: p-values of Benjamini and Hochberg: the records of ``q <= rate`` are as many false ones as that share.
        holm: p-values of Holm: any false one among those below ``rate`` has at most that probability.
    """

    inside: np.ndarray
    outside: np.ndarray
    advantage: np.ndarray
    interval: np.ndarray
    p: np.ndarray
    q: np.ndarray
    holm: np.ndarray

    @property
    def tested(self) -> np.ndarray:
        """bool ``[N]``."""
        return ~np.isnan(self.p)

    def found(self, rate: float = RATE) -> np.ndarray:
        """bool ``[N]``: the records found at a false discovery rate of ``rate``."""
        check_share("record_risk", "rate", rate)
        return self.tested & (np.where(self.tested, self.q, 1.0) <= rate)


def record_risk(scores: Tensor, keep: Tensor, *, level: float = 0.95) -> RecordRisk:
    """Test each record by the exact rank test of Wilcoxon, Mann and Whitney over shadow models.

    ``U`` counts the pairs of a shadow that held the record and one that did not in which the first has the higher
    score. If the record does not matter, each choice of shadows that hold it is as likely as any other, which makes p
    exact whatever the scores are. Ties count against a finding, and half in the advantage.

    Args:
        scores: ``[M, N]``, higher for members, each row a function of its own model only: phi, the mean over queries.
            (Scores that were made with ``keep``, as those of LiRA, do not keep the test exact.)
        keep: bool ``[M, N]``, drawn by chance: the shadows that held each record.
        level: coverage of the interval of the advantage, a score interval with the variance of Hanley and McNeil.
    Returns: :class:`RecordRisk`; a record with fewer than 4 shadows on a side is not tested.
    Raises: UserError naming the argument.
    Source: Mann and Whitney, Annals of Mathematical Statistics 18 (1947); the interval: Newcombe, Statistics in
        Medicine 25 (2006) 559-573, method 5; q: Benjamini and Hochberg, JRSS B 57 (1995).
    """
    check_share("record_risk", "level", level)
    values, keep = matrices("record_risk", scores, keep)
    refuse_nan("scores", values)
    held, values = keep.T.numpy(), values.double().T.contiguous().numpy()
    inside, outside = held.sum(1), (~held).sum(1)
    tested = (inside >= LEAST_SHADOWS) & (outside >= LEAST_SHADOWS)
    above, ties = np.zeros(len(held), np.int64), np.zeros(len(held), np.int64)
    for count in np.unique(inside[tested]):
        rows = tested & (inside == count)
        above[rows], ties[rows] = _pairs(values[rows], held[rows], int(count))
    advantage, p = np.full(len(held), np.nan), np.full(len(held), np.nan)
    interval = np.full((len(held), 2), np.nan)
    if tested.any():
        sizes = sorted({(int(m), len(keep) - int(m)) for m in np.unique(inside[tested])})
        tails = _tails(sizes)
        for m, n in sizes:
            rows = tested & (inside == m) & (outside == n)
            p[rows] = tails[m, n][above[rows]]
            twice, back = np.unique(2 * above[rows] + ties[rows], return_inverse=True)
            auc = twice / (2 * m * n)
            advantage[rows] = (2 * auc - 1)[back]
            interval[rows] = (2 * _score_intervals(auc, m, n, level) - 1)[back]
    return RecordRisk(inside, outside, advantage, interval, p, benjamini_hochberg(p), holm_of_array(p))


def _pairs(values: np.ndarray, held: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(pairs in which the shadow that held the record is above, ties) of ``[R, M]``, ``count`` of each row held."""
    import torch

    high = torch.from_numpy(values[held].reshape(len(values), count))
    low = torch.from_numpy(values[~held].reshape(len(values), -1)).sort(1).values
    below = torch.searchsorted(low, high)
    above = below.sum(1)
    return above.numpy(), (torch.searchsorted(low, high, right=True) - below).sum(1).numpy()


def _tails(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """(m, n) -> probability of ``U >= u`` by chance, for u in [0, m n].

    Exact by the recursion ``f(m, n, u) = m / (m + n) f(m - 1, n, u - n) + n / (m + n) f(m, n - 1, u)`` of Mann and
    Whitney, all terms of one sign; beyond :data:`MOST_PAIRS` normal, with the fourth moment (Fix and Hodges, Annals of
    Mathematical Statistics 26 (1955)).
    """
    tails = {(m, n): _normal_tail(m, n) for m, n in sizes if m * n > MOST_PAIRS}
    exact = [pair for pair in sizes if pair not in tails]
    if not exact:
        return tails
    widest, most = max(n for _, n in exact), max(m for m, _ in exact)
    rows = [np.ones(1)] * (widest + 1)  # of m = 0: U is 0
    for m in range(1, most + 1):
        before, rows = rows, [np.ones(1)]
        for n in range(1, widest + 1):
            each = np.zeros(m * n + 1)
            each[n:] = m / (m + n) * before[n]
            each[: m * (n - 1) + 1] += n / (m + n) * rows[n - 1]
            rows.append(each)
        for pair in exact:
            if pair[0] == m:
                tails[pair] = np.minimum(rows[pair[1]][::-1].cumsum()[::-1], 1.0)
    return tails


def _normal_tail(m: int, n: int) -> np.ndarray:
    from scipy.special import ndtr

    u = np.arange(m * n + 1)
    z = (u - 0.5 - m * n / 2) / (m * n * (m + n + 1) / 12) ** 0.5
    fourth = -0.6 * (m * m + n * n + m * n + m + n) / (m * n * (m + n + 1))  # excess kurtosis of U, to leading order
    density = np.exp(-z * z / 2) / (2 * np.pi) ** 0.5
    return np.clip(ndtr(-z) + fourth / 24 * (z**3 - 3 * z) * density, 0.0, 1.0)


def _score_intervals(auc: np.ndarray, m: int, n: int, level: float) -> np.ndarray:
    """``[R, 2]``: the AUCs t with ``|auc - t| <= z sqrt(V(t))`` for m and n models."""
    z = normal_quantile(0.5 + level / 2)
    ends = []
    for outer in (0.0, 1.0):
        low, high = np.full(len(auc), outer), auc.astype(np.float64)
        for _ in range(HALVINGS):
            t = (low + high) / 2
            h = model_variance(t)
            refuted = np.abs(auc - t) > z * np.sqrt(h * (1 / m + 1 / n) + (t * (1 - t) - 2 * h) / (m * n))
            low, high = np.where(refuted, t, low), np.where(refuted, high, t)
        ends.append(high)
    return np.stack(ends, 1)


def least_advantage(inside: int, outside: int, count: int, rate: float = RATE, power: float = POWER) -> float | None:
    """The smallest advantage of one record among ``count`` that so many shadows find with probability ``power``.

    A record that is alone has to reach ``p <= rate / count``. Its scores are normal with the same variance on both
    sides; ``U`` is then normal with mean ``m n A`` and the variance that such a shift gives.
    Returns: None where even a record whose every score in a shadow that held it is above all others is not found.
    Source: of the variance: Lehmann, "Nonparametrics" (1975), section 2.3.
    """
    tail = _tails([(inside, outside)])[inside, outside]
    if tail[-1] > rate / count:
        return None
    least, reach = int(np.argmax(tail <= rate / count)), normal_quantile(power)
    low, high = 0.0, 20.0  # of the shift, in standard deviations
    for _ in range(HALVINGS):
        shift = (low + high) / 2
        mean, deviation = _moments_under_shift(inside, outside, shift)
        low, high = (low, shift) if mean - reach * deviation >= least - 0.5 else (shift, high)
    return 2 * _moments_under_shift(inside, outside, high)[0] / (inside * outside) - 1


def _moments_under_shift(m: int, n: int, shift: float) -> tuple[float, float]:
    """Mean and standard deviation of U where one side is ``shift`` standard deviations above the other."""
    from scipy.special import ndtr, owens_t

    auc = float(ndtr(shift / 2**0.5))
    both = auc - 2 * float(owens_t(shift / 2**0.5, 3**-0.5))  # of two pairs that share a shadow: correlation 1/2
    variance = m * n * (auc * (1 - auc) + (m + n - 2) * (both - auc * auc))
    return m * n * auc, max(variance, 0.0) ** 0.5


def by_label(
    risk: RecordRisk,
    labels: Sequence[Any] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    rate: float = RATE,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row for each value of ``labels``: a class, or any group of records (site, sex, patient).

    The interval of the mean advantage is a percentile bootstrap over ``clusters`` of records that belong together
    (those of one patient), resampled whole; over records without them. It is that of these shadows: their own chance
    is not in it.

    Args:
        labels, clusters: ``[N]``, texts or integers.
        rate: false discovery rate of all records together.
    Returns: rows {"label" (as text), "records", "tested", "found", "mean_advantage", "interval", "largest"} in the
        order of the labels; figures of a label without a tested record are None.
    """
    rows, found = [], risk.found(rate)
    values, at = np.unique(np.asarray(labels), return_inverse=True)
    belongs = np.arange(len(at)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    for number, value in enumerate(values):
        mine = at == number
        tested = mine & risk.tested
        row: dict[str, Any] = {"label": str(value), "records": int(mine.sum()), "tested": int(tested.sum())}
        row |= {"found": int(found[mine].sum()), "mean_advantage": None, "interval": None, "largest": None}
        if row["tested"]:
            each = risk.advantage[tested]
            row |= {"mean_advantage": float(each.mean()), "largest": float(each.max())}
            row["interval"] = _cluster_bootstrap(each, belongs[tested], level, seed)
        rows.append(row)
    return rows


def _cluster_bootstrap(values: np.ndarray, clusters: np.ndarray, level: float, seed: int) -> list[float] | None:
    """Of the mean over values, whole clusters drawn with replacement; None of one cluster, which has no spread."""
    _, at = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(at).astype(np.float64)
    count = len(sizes)
    if count < 2:
        return None
    sums, draws = np.bincount(at, values), np.random.Generator(np.random.Philox(seed))
    order = np.lexsort((sums, sizes))  # where a record stands must not show in a digit
    sums, sizes = sums[order], sizes[order]
    means = []
    for _ in range(max(min(REPLICATES, MOST_DRAWS // count), 100)):
        drawn = draws.integers(count, size=count)
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist()


def summary(risk: RecordRisk, *, rate: float = RATE) -> dict[str, Any]:
    """What is said of all records together, without naming one.

    Returns: {"rate", "records", "tested", "untested" (too few shadows on a side), "found", "share", "found_holm",
        "largest_advantage", "smallest_p", "shadows" [inside, outside] of a typical record, "least_advantage",
        "power"}.
    """
    tested = risk.tested
    count = int(tested.sum())
    values: dict[str, Any] = {"rate": rate, "power": POWER, "records": len(risk.p), "tested": count}
    values |= {"untested": len(risk.p) - count, "found": int(risk.found(rate).sum())}
    values |= dict.fromkeys(("share", "found_holm", "largest_advantage", "smallest_p", "shadows", "least_advantage"))
    if count:
        inside, outside = (int(np.median(each[tested])) for each in (risk.inside, risk.outside))
        values |= {"share": values["found"] / count, "found_holm": int((risk.holm[tested] <= rate).sum())}
        values |= {"largest_advantage": float(np.nanmax(risk.advantage)), "smallest_p": float(np.nanmin(risk.p))}
        values |= {"shadows": [inside, outside], "least_advantage": least_advantage(inside, outside, count, rate)}
    return values
