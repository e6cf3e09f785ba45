"""Figures of a classifier on labelled images, with bootstrap intervals over the images.

One function computes the figures of weighted images: with weights of 1 those of the split, with the counts of a
resampling those of a bootstrap replicate.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer, as_labels, as_tensor, described

BINS = 15  # of the calibration error
REPLICATES = 1000
BLOCK = 128  # replicates that are computed together


def macro_auc(scores: Any, labels: Any) -> float:
    """Mean AUC of the classes, each against the rest, as MedMNIST's evaluator computes it.

    Of two classes the AUC of column 1; of more the mean over classes ``c`` of the AUC of column ``c`` against
    ``labels == c``. An AUC is ``P(s_i > s_j) + P(s_i = s_j) / 2`` over images ``i`` of the class and ``j`` of the
    others, counted in whole numbers. A class without images, or with all of them, has none and is left out of the mean.

    Args:
        scores: ``[N, C]`` float, higher for the class; of several classes probabilities, as a softmax is no monotone
            function of its logit alone. No NaN.
        labels: integers ``[N]`` in [0, C), of at least two classes.
    Raises: UserError naming the argument.
    Source: Yang et al., "MedMNIST v2", Scientific Data 10 (2023); its ``evaluator.getAUC``.
    """
    scores, labels = _checked("macro_auc", "scores", scores, labels)
    if len(labels.unique()) < 2:
        fail("macro_auc", "labels", "be of at least two classes", f"{len(labels.unique())}")
    return float(_mean_auc(_class_aucs(scores, labels, _ones(labels)))[0])


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """Figures of one classifier on one split.

    Args:
        values: "accuracy", "auc" (:func:`macro_auc`), "balanced_accuracy" and "ece"; None where there is none.
        replicates: of each of these float64 ``[B]``, its values on resampled images.
        recall: of each class, None of a class without images; absent: those classes.
    """

    values: dict[str, float | None]
    replicates: dict[str, Tensor]
    recall: list[float | None]
    absent: list[int]

    def __repr__(self) -> str:
        words = (f"{name} {value:.4f}" for name, value in self.values.items() if value is not None)
        return f"Evaluation({', '.join(words)})"

    def interval(self, name: str, level: float = 0.95) -> list[float] | None:
        """Percentiles of the replicates of a figure; None where it has no value."""
        return None if self.values[name] is None else _percentiles(self.replicates[name], level)

    def minus(self, other: "Evaluation", level: float = 0.95) -> dict[str, dict[str, Any]]:
        """{figure: {"difference", "interval"}} of this classifier less another one on the same images.

        Paired: the replicates of both, made with the same seed, are of the same resampled images.
        """
        rows = {}
        for name, value in self.values.items():
            if value is not None and other.values[name] is not None:
                interval = _percentiles(self.replicates[name] - other.replicates[name], level)
                rows[name] = {"difference": value - other.values[name], "interval": interval}
        return rows


def evaluate(logits: Any, labels: Any, *, seed: int, replicates: int = REPLICATES) -> Evaluation:
    """Accuracy, macro AUC, balanced accuracy, calibration error and recalls of a classifier.

    With ``p = softmax(logits)`` in float64, prediction ``argmax p`` and confidence ``max p``:

    - accuracy: share of right predictions; recall of a class: that share of its images; balanced accuracy: the mean
      recall of the classes that have images.
    - auc: :func:`macro_auc` of ``p``.
    - ece, the expected calibration error: ``sum_m |B_m| / N |acc(B_m) - conf(B_m)|``, where bin ``B_m`` holds the
      images of confidence in ``((m - 1) / 15, m / 15]``, and acc and conf are their accuracy and mean confidence.

    A replicate is of N images drawn with replacement (numpy's PCG64 seeded with ``seed``), and its means are over the
    classes that it has. The calibration error is biased upwards, the more the fewer images are in a bin, and more so on
    replicates: its interval describes the spread and need not hold the value.

    Args:
        logits: ``[N, C]`` float, finite; labels: integers ``[N]`` in [0, C).
    Raises: UserError naming the argument.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3; Efron and Tibshirani, "An
        Introduction to the Bootstrap", 1993, ch. 13 (percentiles).
    """
    logits, labels = _checked("evaluate", "logits", logits, labels)
    if not bool(logits.isfinite().all()):
        fail("evaluate", "logits", "be finite", f"{int(logits.isinf().sum())} infinite")
    replicates = as_integer("evaluate", "replicates", replicates, 1)
    p, right = logits.double().softmax(1), logits.argmax(1) == labels
    figures = functools.partial(_figures, p, right, labels)
    values, recall = figures(_ones(labels))
    parts = [figures(weights)[0] for weights in _resampled(len(labels), seed, replicates)]
    rows = [None if value.isnan() else float(value) for value in recall[0]]
    return Evaluation(
        {name: None if value.isnan().any() else float(value) for name, value in values.items()},
        {name: torch.cat([part[name] for part in parts]) for name in values},
        rows,
        [index for index, value in enumerate(rows) if value is None],
    )


def _checked(where: str, name: str, scores: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Both on the CPU."""
    scores = as_tensor(where, name, scores).detach()
    if scores.ndim != 2 or not scores.dtype.is_floating_point or scores.shape[1] < 2 or len(scores) == 0:
        fail(where, name, "be float [N, C] of at least one image and two classes", described(scores))
    if bool(scores.isnan().any()):
        fail(where, name, "not hold NaN", f"{int(scores.isnan().sum())} NaN")
    return scores.cpu(), as_labels(where, "labels", labels, len(scores), scores.shape[1]).cpu()


def _ones(labels: Tensor) -> Tensor:
    return torch.ones(len(labels), 1, dtype=torch.float64)


def _resampled(count: int, seed: int, replicates: int) -> Iterator[Tensor]:
    """Blocks of float64 ``[N, b]``: how often each image is in each replicate."""
    rng = np.random.default_rng(seed)
    for first in range(0, replicates, BLOCK):
        size = min(BLOCK, replicates - first)
        drawn = size * rng.integers(count, size=(size, count)) + np.arange(size)[:, None]
        yield torch.from_numpy(np.bincount(drawn.ravel(), minlength=size * count)).view(count, size).double()


def _figures(p: Tensor, right: Tensor, labels: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({figure: ``[B]``}, recalls ``[B, C]``) of images with ``weights`` ``[N, B]``; NaN where there is none."""
    classes, count = torch.eye(p.shape[1], dtype=torch.float64)[labels], weights.sum(0)
    correct = right.double()
    recall = weights.T @ (classes * correct[:, None]) / (weights.T @ classes)
    confidence = p.max(1).values
    bins = torch.eye(BINS, dtype=torch.float64)[((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)]
    gaps = weights.T @ (bins * (correct - confidence)[:, None])  # |B_m| (acc(B_m) - conf(B_m))
    values = {
        "accuracy": correct @ weights / count,
        "auc": _mean_auc(_class_aucs(p, labels, weights)),
        "balanced_accuracy": recall.nanmean(1),
        "ece": gaps.abs().sum(1) / count,
    }
    return values, recall


def _mean_auc(aucs: Tensor) -> Tensor:
    return aucs.nanmean(1)


def _class_aucs(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """AUC of each class against the rest, ``[B, C]`` (of two classes ``[B, 1]``, of class 1); NaN where there is none.

    Args:
        scores: ``[N, C]``; weights: float64 ``[N, B]`` of whole numbers, whose sums float64 holds exactly.
    """
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


def _percentiles(replicates: Tensor, level: float) -> list[float]:
    """Of the replicates that have a value."""
    values = replicates[~replicates.isnan()]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(values, ends).tolist()
