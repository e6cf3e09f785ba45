"""The audit: attack target models with one set of shadow statistics and report what was found, with intervals."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble import ModelArray, Shadows
from kr_fast.membership.attacks import lira
from kr_fast.membership.curve import FPRS, Curve, roc
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger

ATTACKS = ("loss", "lira", "lira_offline")
# Below this many shadows on a side one variance for all examples attacks better than one each (Carlini et al., fig. 9).
PER_EXAMPLE_FROM = 64


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """``curves[target][attack]`` and everything that must be said beside them."""

    curves: dict[str, dict[str, Curve]]
    scores: dict[str, dict[str, Tensor]]
    num_shadows: int
    members: int
    non_members: int
    augment: str
    variance: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: {target: {attack: {auc, auc_ci, tpr_at_fpr, balanced_accuracy}}, "setting": {...}}."""
        targets = {
            name: {attack: describe(curve) for attack, curve in curves.items()} for name, curves in self.curves.items()
        }
        setting = {
            "num_shadows": self.num_shadows,
            "members": self.members,
            "non_members": self.non_members,
            "augment": self.augment,
            "lira_variance": self.variance,
            "warnings": list(self.warnings),
        }
        return {**targets, "setting": setting}


def describe(curve: Curve) -> dict[str, Any]:
    """The figures of one curve."""
    return {
        "auc": curve.auc,
        "auc_ci": list(curve.auc_interval()),
        "tpr_at_fpr": {str(fpr): curve.tpr_at(fpr) for fpr in FPRS},
        "balanced_accuracy": curve.balanced_accuracy,
    }


def audit(
    target: nn.Module | Mapping[str, nn.Module],
    shadows: Shadows,
    images: Tensor,
    labels: Tensor,
    members: Tensor,
    *,
    attacks: tuple[str, ...] = ATTACKS,
    augment: str = "none",
) -> AuditReport:
    """Attack one or several target models.

    All targets are scored with the same shadow statistics. For a model that was not trained as the shadows were (a
    distilled Student beside its Teacher) this is a transfer attack: a lower bound on what it gives away.

    Args:
        target: a classifier, or name -> classifier.
        shadows: of :func:`kr_fast.train_shadows`, trained on halves of exactly these images.
        images: uint8 ``[N, H, W, C]``, the pool.
        labels: int64 ``[N]``.
        members: bool ``[N]``, True for the examples that the targets' training used.
        attacks: among "loss" (threshold on the loss), "lira" (online) and "lira_offline".
        augment: the queries, see :meth:`kr_fast.ModelArray.signals`.
    Raises: TypeError or ValueError naming the argument.
    """
    targets = {"target": target} if isinstance(target, nn.Module) else dict(target)
    for attack in attacks:
        if attack not in ATTACKS:
            fail("audit", "attacks", f"hold names among {', '.join(ATTACKS)}", attack)
    count = len(images)
    if labels.shape != (count,) or labels.dtype != torch.int64:
        fail("audit", "labels", f"be int64 [{count}]", f"{labels.dtype} {list(labels.shape)}")
    if members.shape != (count,) or members.dtype != torch.bool:
        fail("audit", "members", f"be bool [{count}]", f"{members.dtype} {list(members.shape)}")
    inside = int(members.sum())
    if not 0 < inside < count:
        fail("audit", "members", "hold members and non-members", f"{inside} of {count} members")
    if not targets:
        fail("audit", "target", "hold at least one model", 0)
    if shadows.keep.shape != (len(shadows.array), count):
        fail("audit", "shadows", f"have keep [{len(shadows.array)}, {count}]", list(shadows.keep.shape))
    for name, model in (*targets.items(), ("shadow 0", shadows.array.models[0])):
        _refuse_probabilities(model, images, name)
    phi = shadows.array.signals(images, labels, augment=augment, description="audit shadows")["phi"]
    sides = min(int(shadows.keep.sum(0).min()), int((~shadows.keep).sum(0).min()))
    variance = "per_example" if sides >= PER_EXAMPLE_FROM else "fixed"
    curves, scores = {}, {}
    for name, model in targets.items():
        seen = ModelArray([model]).signals(images, labels, augment=augment)["phi"]
        scores[name] = {}
        for attack in attacks:
            if attack == "loss":
                scores[name][attack] = seen[0, :, 0].double()  # phi is the negative loss, without its saturation
            else:
                variant = "online" if attack == "lira" else "offline"
                scores[name][attack] = lira(phi, shadows.keep, variant=variant, variance=variance, target=seen)[0]
        curves[name] = {attack: roc(value, members) for attack, value in scores[name].items()}
    warnings = _warnings(curves, sides)
    for line in warnings:
        logger.warning("audit: %s", line)
    return AuditReport(curves, scores, len(shadows.array), inside, count - inside, augment, variance, warnings)


def _refuse_probabilities(model: nn.Module, images: Tensor, name: str) -> None:
    """Refuse a model that answers with probabilities: phi would saturate and the attack be blind."""
    logits = ModelArray([model])(images[:64])[0]
    if len(logits) and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        fail("audit", f"target {name}", "return logits (remove its softmax)", "rows that are >= 0 and sum to 1")


def _warnings(curves: dict[str, dict[str, Curve]], sides: int) -> tuple[str, ...]:
    found = []
    if sides < 8:
        found.append(f"only {sides} shadows on a side: LiRA is weak with so few, a low AUC shows little")
    control = next(iter(curves.values()))
    if all(curve.auc_interval()[0] <= 0.5 for curve in control.values()):
        first = next(iter(curves))
        found.append(f"no attack finds the {first}, which was trained on the members: this audit has no power")
    return tuple(found)
