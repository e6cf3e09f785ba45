"""The attack on released images by other pipelines: how near is "near" for an image, whoever was trained on it?"""

from typing import Any

from torch import Tensor

from kr_fast.membership.attacks.catalog import auto_variance
from kr_fast.membership.attacks.scores import lira
from kr_fast.membership.audit.figures import describe
from kr_fast.membership.audit.recipe import across_targets
from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.statistics.balanced import partners
from kr_fast.membership.statistics.curve import roc
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_mask, described

# Images of bytes that differ are at least 1 apart: a copy counts as half as far away, and its logarithm is finite.
COPY = 0.5
ATTACKS = {"offline": "primary", "online": "exploratory", "uncalibrated": "exploratory"}


def calibrated_nearest(
    distances: Tensor, keep: Tensor, *, target: Tensor | None = None, variant: str = "offline", seed: int = 0
) -> Tensor:
    """LiRA on ``phi = -ln max(d, 1/2)``, d the distance of each record to the nearest image that a pipeline drew.

    A plain image has something near it in every synthetic set; what tells of membership is to be nearer than the sets
    of pipelines that were not trained on it are. The variance is that of the audit's LiRA: fixed below 64 pipelines.

    Args:
        distances: ``[M, N]``, Euclidean in grey levels, to the images of M pipelines of the same recipe.
        keep: bool ``[M, N]``, the records that each pipeline (its generator) was trained on.
        target: ``[N]`` or ``[K, N]``, of other pipelines, which are attacked; None attacks each of the M from the
            others, with a partner left out (:func:`kr_fast.membership.partners`).
        variant: "offline" or "online", as of :func:`kr_fast.membership.lira`.
        seed: of the partners.
    Returns: float64 ``[M, N]``, ``[K, N]`` or ``[N]``, higher for members.
    Raises: UserError naming the argument.
    Source: the distance: Chen et al., "GAN-Leaks", CCS 2020, who calibrate by one reference set; likelihood ratios over
        pipelines: Carlini et al., S&P 2022.
    """
    where = "calibrated_nearest"
    keep = as_mask(where, "keep", keep, 2).cpu()
    phi = _phi(where, "distances", distances, keep.shape)
    options = {"variant": variant, "variance": auto_variance(keep)}
    if target is None:
        return lira(phi.T[None], keep, partner=partners(keep, seed, phi.T[None]), **options)
    target = as_numbers(where, "target", target)
    if target.ndim not in (1, 2) or target.shape[-1] != keep.shape[1]:
        fail(where, "target", f"have shape [{keep.shape[1]}] or [K, {keep.shape[1]}]", described(target))
    rows = target.reshape(-1, keep.shape[1])
    scores = lira(phi.T[None], keep, target=_phi(where, "target", rows, rows.shape).T[None], **options)
    return scores[0] if target.ndim == 1 else scores


def _phi(where: str, name: str, distances: Any, shape: tuple[int, ...]) -> Tensor:
    values = as_numbers(where, name, distances).cpu().double()
    if values.shape != shape:
        fail(where, name, f"have shape {list(shape)}", list(values.shape))
    if not bool((values.isfinite() & (values >= 0)).all()):
        fail(where, name, "be finite and at least 0", f"{described(values)} with others")
    return -values.clamp_min(COPY).log()


def attack_nearest(
    own: Tensor, members: Tensor, distances: Tensor, keep: Tensor, *, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Figures of the calibrated attack on one pipeline's images, and over all pipelines, beside the distance alone.

    Args:
        own: ``[N]``, of the pipeline under attack, and members: bool ``[N]``.
        distances, keep: of other pipelines, as of :func:`calibrated_nearest`.
        level: of the intervals; seed: of the partners.
    Returns: attack -> figures: "offline", named beforehand, and the exploratory "online" and "uncalibrated" (minus the
        distance), which share one error (Bonferroni). Each holds auc, auc_ci, auc_ci_corrected, tpr_at_fpr,
        balanced_accuracy, advantage and role, and "recipe": {"targets", "auc"} of :func:`across_targets` over the
        other pipelines, each attacked from the rest.
    """
    figures, corrected = {}, 1 - (1 - level) / (len(ATTACKS) - 1)
    for name, role in ATTACKS.items():
        if name == "uncalibrated":
            scores, alone = -own.double(), -distances.double()
        else:
            scores = calibrated_nearest(distances, keep, target=own, variant=name)
            alone = calibrated_nearest(distances, keep, variant=name, seed=seed)
        curve, over = roc(scores, members), across_targets(alone, keep, (), level)
        wide = curve.auc_interval(level if role == "primary" else corrected)
        figures[name] = describe(curve, level) | {"role": role, "auc_ci_corrected": list(wide)}
        figures[name]["recipe"] = {"targets": over["targets"], "auc": over["auc"]}
    return figures
