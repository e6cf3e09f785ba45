"""Intervals: Clopper-Pearson, bootstrap; and p-values corrected for being several."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kr_fast.ops.membership import bootstrap_auc as ops_bootstrap
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer


def check_share(where: str, name: str, value: Any) -> None:
    """Refuse what is no number in (0, 1). Raises: UserError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
        fail(where, name, "be in (0, 1)", value)


def normal_quantile(share: float) -> float:
    """Quantile of the standard normal."""
    from scipy.special import ndtri

    return float(ndtri(share))


def binomial_quantile(share: float, count: int, rate: np.ndarray) -> np.ndarray:
    """Least integer ``k`` with ``P[Binomial(count, rate) <= k] >= share``."""
    from scipy.special import bdtr, bdtrik

    above = np.ceil(bdtrik(share, count, rate))
    below = np.maximum(above - 1, 0)
    return np.where(bdtr(below, count, rate) >= share, below, above).astype(np.int64)


def clopper_pearson(hits: np.ndarray, count: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) bound of a rate from ``hits`` of ``count``, each missed with probability at most ``error``.

    Source: Clopper and Pearson, Biometrika 1934.
    """
    from scipy.special import betaincinv

    hits = np.asarray(hits, dtype=np.float64)
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), count - hits + 1, error), 0.0)
    high = np.where(hits < count, betaincinv(hits + 1, np.maximum(count - hits, 1), 1 - error), 1.0)
    return low, high


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for being several: the family errs with probability at most ``p`` where one is called true.

    Ascending, the i-th (from 0) of m times ``m - i``, at least the one before, at most 1. None is no test.
    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    values = np.array([np.nan if each is None else each for each in p], dtype=np.float64)
    return [None if np.isnan(each) else float(each) for each in holm_of_array(values)]


def holm_of_array(p: np.ndarray) -> np.ndarray:
    """:func:`holm` of float64 ``[N]``, where NaN is no test."""
    order = _ascending(p)
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number: of those at most ``q``, a share of at most ``q`` is false on average.

    Ascending, the i-th (from 1) of m times ``m / i``, at most the next one; NaN is no test. For independent tests, and
    for positively dependent ones. Source: Benjamini and Hochberg, JRSS B 57 (1995).
    """
    order = _ascending(p)
    corrected = np.full(len(p), np.nan)
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    corrected[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return corrected


def _ascending(p: np.ndarray) -> np.ndarray:
    """Positions of the numbers, from low to high."""
    return np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]


def bootstrap(
    curve: Any, *, replicates: int = 1000, fprs: tuple[float, ...] = (), level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Percentile bootstrap of AUC and TPR, members and non-members resampled apart, thresholds chosen anew each time.

    Args:
        curve: of :func:`kr_fast.membership.roc`.
        replicates: number of resamplings.
        fprs: false-positive rates at which the TPR is taken by the rule "fpr <= target".
        level: coverage of the intervals.
        seed: of the draws; the same on every machine and for any number of threads.
    Returns: {"auc": [low, high], "tpr": {fpr: [low, high]}, "replicates"}.
    Raises: UserError naming the argument.
    """
    if not hasattr(curve, "groups"):
        fail("bootstrap", "curve", "be a curve, as roc(scores, members) returns it", type(curve).__name__)
    limits = sorted(float(fpr) for fpr in fprs)
    for name, value in (("level", level), *(("fprs", fpr) for fpr in limits)):
        check_share("bootstrap", name, value)
    replicates, seed = as_integer("bootstrap", "replicates", replicates, 1), as_integer("bootstrap", "seed", seed, 0)
    counts = torch.tensor([int(np.floor(fpr * curve.negatives + 1e-9)) for fpr in limits], dtype=torch.int64)
    inside, outside = (torch.from_numpy(np.ascontiguousarray(side)) for side in curve.groups)
    auc, tp = ops_bootstrap.bootstrap_auc(inside, outside, counts, replicates=replicates, seed=seed)
    ends = [(1 - level) / 2, (1 + level) / 2]
    rates = np.quantile(tp.numpy() / curve.positives, ends, axis=0) if limits else None
    return {
        "auc": np.quantile(auc.numpy(), ends).tolist(),
        "tpr": {fpr: rates[:, i].tolist() for i, fpr in enumerate(limits)},
        "replicates": replicates,
    }
