"""Figures of a classifier on labelled images, with bootstrap intervals over the images.

The figures of weighted images (:mod:`kr_fast.metrics.weighted`) are those of the split with weights of 1, and those of
a bootstrap replicate with the counts of a resampling.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.metrics.weighted import class_aucs, figures
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_groups, as_integer, as_labels, as_tensor, described

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
    return float(class_aucs(scores, labels, _ones(labels)).nanmean(1)[0])


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """Figures of one classifier on one split.

    Args:
        values: "accuracy", "auc" (:func:`macro_auc`), "balanced_accuracy", "ece", and "kappa" where it was asked for;
            None where there is none.
        replicates: of each of these float64 ``[B]``, its values on resampled images.
        classes: "recall" (sensitivity), "precision", "auc" and "ece" of each class; None where there is none.
        class_replicates: of each of these float64 ``[B, C]``, NaN where there is none.
        confusion: int64 ``[C, C]``, images of each true class (row) by predicted one.
        confusion_replicates: float64 ``[B, C, C]``, the same as shares of the row; None for more than 20 classes.
        absent: the classes without images.
    """

    values: dict[str, float | None]
    replicates: dict[str, Tensor]
    classes: dict[str, list[float | None]]
    class_replicates: dict[str, Tensor]
    confusion: Tensor
    confusion_replicates: Tensor | None
    absent: list[int]

    def __repr__(self) -> str:
        words = (f"{name} {value:.4f}" for name, value in self.values.items() if value is not None)
        return f"Evaluation({', '.join(words)})"

    @property
    def recall(self) -> list[float | None]:
        """Of each class, None of a class without images."""
        return self.classes["recall"]

    def interval(self, name: str, level: float = 0.95) -> list[float] | None:
        """Percentiles of the replicates of a figure; None where it has no value."""
        return None if self.values[name] is None else _percentiles(self.replicates[name], level).tolist()

    def class_intervals(self, name: str, level: float = 0.95) -> list[list[float] | None]:
        """:meth:`interval` of a figure of each class."""
        pairs = _percentiles(self.class_replicates[name], level).T.tolist()
        return [None if value is None else pair for value, pair in zip(self.classes[name], pairs, strict=True)]

    def confusion_intervals(self, level: float = 0.95) -> list[list[list[float]] | None] | None:
        """Of each class, of the shares of its images by prediction; None of absent classes, and of too many classes."""
        if self.confusion_replicates is None:
            return None
        rows = _percentiles(self.confusion_replicates, level).permute(1, 2, 0).tolist()
        return [None if index in self.absent else row for index, row in enumerate(rows)]

    def minus(self, other: "Evaluation", level: float = 0.95) -> dict[str, dict[str, Any]]:
        """{figure: {"difference", "interval"}} of this classifier less another one on the same images.

        Paired: the replicates of both, made with the same seed, are of the same resampled images.
        """
        rows = {}
        for name, value in self.values.items():
            if value is not None and (others := other.values[name]) is not None:
                interval = _percentiles(self.replicates[name] - other.replicates[name], level).tolist()
                rows[name] = {"difference": value - others, "interval": interval}
        return rows


def evaluate(
    logits: Any, labels: Any, *, seed: int, replicates: int = REPLICATES, ordinal: bool = False, groups: Any = None
) -> Evaluation:
    """Accuracy, macro AUC, calibration error, confusion matrix and figures of each class of a classifier.

    With ``p = softmax(logits)`` in float64, prediction ``argmax p`` and confidence ``max p``:

    - accuracy: share of right predictions. Of a class: recall (sensitivity), that share of its images; precision, that
      share of the images that are predicted to be of it. Balanced accuracy: the mean recall of the classes that have
      images.
    - auc: :func:`macro_auc` of ``p``; of a class its AUC against the rest.
    - ece, the expected calibration error: ``sum_m |B_m| / N |acc(B_m) - conf(B_m)|``, where bin ``B_m`` holds the
      images of confidence in ``((m - 1) / 15, m / 15]``, and acc and conf are their accuracy and mean confidence. Of a
      class c (classwise): the same of all images binned by ``p_c``, with the share of class c and the mean ``p_c``.
    - kappa, with ``ordinal``, quadratic weighted: ``1 - sum_(a, b) (a - b)^2 O_ab / sum_(a, b) (a - b)^2 E_ab``, where
      ``O_ab`` is the share of images of class a with prediction b, and ``E_ab`` the product of their shares. None where
      all images are of one class and are predicted so.

    A replicate is of N images drawn with replacement (numpy's PCG64 seeded with ``seed``), or, with ``groups``, of as
    many groups as there are, each with all of its images, as those of a patient are alike. Its means are over the
    classes that it has. The calibration error is biased upwards, the more the fewer images are in a bin, and more so on
    replicates: its interval describes the spread and need not hold the value.

    Args:
        logits: ``[N, C]`` float, finite; labels: integers ``[N]`` in [0, C).
        ordinal: whether the classes are grades, in the order of their numbers.
        groups: ``[N]`` integers or texts, of at least two groups: the images that belong together.
    Raises: UserError naming the argument.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3; classwise: Kull et al., "Beyond
        Temperature Scaling", NeurIPS 2019, eq. 2; Cohen, "Weighted Kappa", Psychological Bulletin 70 (1968); Efron and
        Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13 (percentiles); whole groups: Davison and Hinkley,
        "Bootstrap Methods and their Application", 1997, section 3.8.
    """
    logits, labels = _checked("evaluate", "logits", logits, labels)
    if not bool(logits.isfinite().all()):
        fail("evaluate", "logits", "be finite", f"{int(logits.isinf().sum())} infinite")
    replicates = as_integer("evaluate", "replicates", replicates, 1)
    units = torch.arange(len(labels)) if groups is None else _units(groups, len(labels))
    p, predicted = logits.double().softmax(1), logits.argmax(1)
    whole = figures(p, predicted, labels, _ones(labels), ordinal)
    blocks = _resampled(int(units.max()) + 1, seed, replicates)
    parts = [figures(p, predicted, labels, weights[units], ordinal) for weights in blocks]
    classes = {name: [_or_none(value) for value in values[0]] for name, values in whole.classes.items()}
    confusions = [part.confusion for part in parts if part.confusion is not None]
    shares = [each / each.sum(2, keepdim=True) for each in confusions]
    count = p.shape[1]
    return Evaluation(
        {name: _or_none(value[0]) for name, value in whole.values.items()},
        {name: torch.cat([part.values[name] for part in parts]) for name in whole.values},
        classes,
        {name: torch.cat([part.classes[name] for part in parts]) for name in classes},
        torch.bincount(labels * count + predicted, minlength=count * count).view(count, count),
        torch.cat(shares) if shares else None,
        [index for index, value in enumerate(classes["recall"]) if value is None],
    )


def _or_none(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _units(groups: Any, count: int) -> Tensor:
    """int64 ``[N]``: the number of each image's group, from 0 without gaps."""
    units = np.unique(as_groups("evaluate", "groups", groups, count), return_inverse=True)[1]
    if units.max() == 0:
        fail("evaluate", "groups", "be of at least two groups", 1)
    return torch.from_numpy(units)


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


def _percentiles(replicates: Tensor, level: float) -> Tensor:
    """``[2, ...]`` over the first axis, of the replicates that have a value; NaN where none has."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.nanquantile(replicates, ends, 0)
