"""Figures of a classifier on weighted images: of weights of 1 those of a split, of counts those of a replicate.

Every function takes weights float64 ``[N, B]`` of whole numbers, whose sums float64 holds exactly, and computes all B
columns at once. NaN stands for a figure that there is none of.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # of the calibration errors
MOST_CONFUSED = 20  # classes, up to which the confusion matrix of a replicate is computed


class Figures(NamedTuple):
    """``values``: of all images, ``[B]``; ``classes``: of each class, ``[B, C]``; ``confusion``: ``[B, C, C]``."""

    values: dict[str, Tensor]
    classes: dict[str, Tensor]
    confusion: Tensor | None


def figures(p: Tensor, predicted: Tensor, labels: Tensor, weights: Tensor, ordinal: bool) -> Figures:
    """All of :func:`kr_fast.metrics.evaluate`; ``p``: float64 ``[N, C]``, probabilities; predicted: int64 ``[N]``."""
    count, classes = weights.sum(0), p.shape[1]
    right = (predicted == labels).double()
    truth, said = (torch.eye(classes, dtype=torch.float64)[each] for each in (labels, predicted))
    hits = weights.T @ (truth * right[:, None])
    of_class = weights.T @ truth
    recall, precision = hits / of_class, hits / (weights.T @ said)
    aucs = class_aucs(p, labels, weights)
    there = of_class > 0
    by_class = {
        "recall": recall,
        "precision": precision,
        "auc": aucs.expand(-1, classes),
        "ece": torch.where(there, _class_calibration(p, truth, weights) / count[:, None], torch.nan),
    }
    values = {
        "accuracy": right @ weights / count,
        "auc": aucs.nanmean(1),
        "balanced_accuracy": recall.nanmean(1),
        "ece": _calibration(p.max(1).values, right, weights) / count,
    }
    if ordinal:
        values["kappa"] = _quadratic_kappa(labels.double(), predicted.double(), weights)
    return Figures(values, by_class, _confusion(labels, predicted, classes, weights))


def class_aucs(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """AUC of each class against the rest, ``[B, C]`` (of two classes ``[B, 1]``, of class 1), by scores ``[N, C]``."""
    columns = range(scores.shape[1]) if scores.shape[1] > 2 else (1,)
    return torch.stack([_auc(scores[:, index], labels == index, weights) for index in columns], 1)


def _auc(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """float64 ``[B]``: ``sum_i w_i (sum_(s_j < s_i) w_j + sum_(s_j = s_i) w_j / 2) / (W+ W-)``."""
    inside, outside = weights[positive], weights[~positive]
    ordered, order = scores[~positive].sort()
    below = torch.nn.functional.pad(outside[order].cumsum(0), (0, 0, 1, 0))  # weight of the first k others
    first, last = (torch.searchsorted(ordered, scores[positive], right=right) for right in (False, True))
    twice = (inside * (below[first] + below[last])).sum(0)
    return twice / (2 * inside.sum(0) * outside.sum(0))


def _calibration(p: Tensor, occurred: Tensor, weights: Tensor) -> Tensor:
    """``[B]``: ``sum_m |sum_(i in B_m) w_i (occurred_i - p_i)|``, bin ``B_m`` of p in ``((m - 1) / 15, m / 15]``."""
    bins = torch.eye(BINS, dtype=torch.float64)[((p * BINS).ceil().long() - 1).clamp(0, BINS - 1)]
    return (weights.T @ (bins * (occurred - p)[:, None])).abs().sum(1)


def _class_calibration(p: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([_calibration(*columns, weights) for columns in zip(p.T, truth.T, strict=True)], 1)


def _quadratic_kappa(labels: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    """``[B]``: ``1 - E (y - z)^2 / E (y - z')^2``, z' of the predictions' distribution and independent of y."""
    columns = (labels, predicted, labels**2, predicted**2, (labels - predicted) ** 2)
    count, (sum_y, sum_z, square_y, square_z, apart) = weights.sum(0), (each @ weights for each in columns)
    return 1 - count * apart / (count * (square_y + square_z) - 2 * sum_y * sum_z)  # of whole numbers, exact


def _confusion(labels: Tensor, predicted: Tensor, classes: int, weights: Tensor) -> Tensor | None:
    """``[B, C, C]``: weight of each true class (row) by prediction; None for too many classes."""
    if classes > MOST_CONFUSED:
        return None
    pairs = torch.zeros(classes * classes, weights.shape[1], dtype=torch.float64)
    pairs.index_add_(0, labels * classes + predicted, weights)
    confusion: Tensor = pairs.T.unflatten(1, (classes, classes))
    return confusion
