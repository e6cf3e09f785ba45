"""Mislabelled canaries: a positive control that an attack detects wherever a training memorises.

A model can give a wrong label of a single image only by having memorised it, so an attack with any power finds the
canaries of a model whose training memorises at all. What it finds of ordinary records then means what it says.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.membership.attacks.catalog import auto_variance
from kr_fast.membership.attacks.scores import lira
from kr_fast.membership.audit.recipe import across_targets
from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.statistics.balanced import partners
from kr_fast.membership.statistics.curve import roc
from kr_fast.membership.statistics.intervals import check_share, clopper_pearson
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_groups, as_integer, as_labels, as_mask

LEAST = 10  # canaries: five on a side of each model
MOST_SHARE = 0.1  # of the training set: more wrong labels make another training of it
FPRS = (0.1, 0.01)
RESAMPLES, AT_A_TIME = 2000, 1 << 22  # of canaries and models; weights held at a time


@dataclasses.dataclass(frozen=True)
class Canaries:
    """K training examples with wrong labels, and the M models that each is in.

    ``index``: int64 ``[K]``, of the training examples; ``labels``: int64 ``[K]``, the wrong ones; ``keep``: bool
    ``[M, K]``, True where model m is trained on canary k.
    """

    index: Tensor
    labels: Tensor
    keep: Tensor


def draw_canaries(labels: Tensor, count: int, *, models: int, classes: int, seed: int, groups: Any = None) -> Canaries:
    """Draw ``count`` canaries among N training examples: each with a uniform random label of another class.

    Each canary's membership in a model is a fair coin. The coins are thrown so that each canary is in half of the
    models, and, as canaries come in pairs of which a model holds one, each model holds half of the canaries: all
    models are trained on equally many examples.

    Args:
        labels: integers ``[N]`` of the training examples.
        count: even, at least 10 and at most a tenth of N.
        models: even, at least 2; classes: at least 2; seed: of all draws.
        groups: ``[N]`` integers or texts, what each example belongs to (a patient, a site), or None: no two canaries
            are then of one group, as they would not be independent.
    Raises: UserError naming the argument.
    Source: Aerni, Zhang and Tramer, "Evaluations of Machine Learning Privacy Defenses are Misleading", CCS 2024.
    """
    where = "draw_canaries"
    count, classes = as_integer(where, "count", count, LEAST), as_integer(where, "classes", classes, 2)
    labels = as_labels(where, "labels", labels, classes=classes).cpu()
    if count % 2:
        fail(where, "count", "be even", count)
    if count > (most := int(MOST_SHARE * len(labels))):
        fail(where, "count", f"be at most {most}, a tenth of the {len(labels)} examples", count)
    draw = seeds.generator(seed, "canaries")
    index = torch.randperm(len(labels), generator=draw)
    if groups is not None:
        names = as_groups(where, "groups", groups, len(labels))[index.numpy()]
        first = np.unique(names, return_index=True)[1]
        if count > len(first):
            fail(where, "count", f"be at most {len(first)}, the number of groups", count)
        index = index[np.sort(first)]
    index = index[:count]
    wrong = (labels[index] + torch.randint(1, classes, (count,), generator=draw)) % classes
    half = keep_matrix(models, count // 2, seeds.derive(seed, "canaries"))
    return Canaries(index, wrong, torch.cat([half, ~half], 1))


def attack_canaries(phi: Tensor, keep: Tensor, *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """LiRA on canaries alone: each model is attacked in turn with the other M - 1 as shadows.

    The AUC is the mean over models, its interval over other models and other canaries (:func:`across_targets`). A
    TPR is that of all M x K scores together at the largest realised FPR that is at most the stated one; its interval
    is of the pigeonhole bootstrap (Owen, Annals of Applied Statistics 1 (2007)): models and canaries are resampled
    apart, each time with a threshold of its own. Near 0 and 1 both would be too narrow, as few canaries are not told
    apart: each interval is widened to Clopper and Pearson's with the K canaries as trials. That holds for any mean of
    K independent shares, since none varies more than a trial does.

    Args:
        phi: float ``[A, K, M]``, signals of the models with the wrong labels.
        keep: bool ``[M, K]``.
        level: coverage of the intervals; seed: of partners and resamples.
    Returns: {"models", "auc", "auc_ci", "sd" (of models), "tpr_at_fpr": {fpr: {"tpr", "fpr", "false_positives",
        "interval", "point_claim"}}}; a TPR on fewer than 10 false positives is None.
    Raises: UserError or ValueError naming the argument.
    """
    check_share("attack_canaries", "level", level)
    phi, keep = as_numbers("attack_canaries", "phi", phi), as_mask("attack_canaries", "keep", keep, 2).cpu()
    scores = lira(phi, keep, variance=auto_variance(keep), partner=partners(keep, seed, phi)).cpu()
    auc = across_targets(scores, keep, (), level)["auc"]
    ends = _widened(auc["interval"] if 0 < auc["mean"] < 1 else None, auc["mean"], len(keep[0]), level)
    tprs = {str(fpr): _tpr(scores, keep, fpr, level, seed) for fpr in FPRS}
    return {"models": len(keep), "auc": auc["mean"], "auc_ci": ends, "sd": auc["sd"], "tpr_at_fpr": tprs}


def _widened(ends: Sequence[float] | None, share: float, trials: int, level: float) -> list[float]:
    exact = [float(end) for end in clopper_pearson(np.array(share * trials), trials, (1 - level) / 2)]
    return exact if ends is None else [min(ends[0], exact[0]), max(ends[1], exact[1])]


def _tpr(scores: Tensor, keep: Tensor, fpr: float, level: float, seed: int) -> dict[str, Any]:
    point = roc(scores.flatten(), keep.flatten()).tpr_at(fpr, level)
    error = (1 - level) / 2
    ends = np.quantile(_resampled(scores.numpy(), keep.numpy(), fpr, seed), [error, 1 - error]).tolist()
    ends = _widened(ends, point["tpr"], scores.shape[1], level)
    return point | {"tpr": point["tpr"] if point["point_claim"] else None, "interval": ends}


def _resampled(scores: np.ndarray, keep: np.ndarray, fpr: float, seed: int) -> np.ndarray:
    """float64 ``[R]``: the TPR of each resample of models and canaries, at a threshold of its own."""
    models, count = scores.shape
    order = np.argsort(-scores, axis=None, kind="stable")
    # Scores that tie share a threshold: only the last of them is one.
    last = np.append(np.diff(scores.ravel()[order]) != 0, True)
    inside = keep.ravel()[order]
    draw, rates = np.random.default_rng(seeds.derive(seed, "canaries")), []
    for part in np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * scores.size // AT_A_TIME)):
        rows = draw.multinomial(models, np.full(models, 1 / models), len(part))
        columns = draw.multinomial(count, np.full(count, 1 / count), len(part))
        weights = (rows[:, :, None] * columns[:, None, :]).reshape(len(part), -1)[:, order]
        tp, fp = np.cumsum(weights * inside, 1), np.cumsum(weights * ~inside, 1)
        within = last & (fp <= fpr * fp[:, -1:] + 1e-9)
        with np.errstate(invalid="ignore"):  # a resample without members says nothing
            rates.append(np.max(np.where(within, tp, 0), 1) / tp[:, -1])
    rates = np.concatenate(rates)
    return rates[np.isfinite(rates)]


def power(figures: dict[str, Any], own: Sequence[float]) -> bool:
    """Whether canaries prove that an attack has power on a target: their interval lies above the target's own.

    Args:
        figures: of :func:`attack_canaries`; own: interval of the attack's AUC on the target, by its own members.
    """
    return figures["auc_ci"][0] > max(own[1], 0.5)
