"""Negative controls: attacks that must not succeed. Where one does, the two sides differ without any leakage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kr_fast.membership.attacks.blind import FEWEST, blind
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.runtime import seeds

FEWEST_HALVED = 4  # examples of a side whose halves are told apart


def negative_controls(
    images: Tensor | None, members: Tensor, scores: Mapping[str, Tensor], *, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """The AUC of each control with its interval, and whether it passed.

    - ``blind``: membership from the images alone, :func:`kr_fast.membership.blind`. It passes if its interval does not
      lie above 0.5, and is None without images or with fewer than 10 examples on a side.
    - ``members`` and ``non_members`` of each target: one half of a side, drawn by chance, against the other half by
      the very scores of the attack. It passes if 0.5 lies in its interval; None with fewer than 4 examples.

    The intervals share the error of ``level`` (Bonferroni): where nothing differs, all controls pass together with that
    probability at least, however many targets there are.

    Args:
        images: uint8 ``[N, H, W, C]`` or None; members: bool ``[N]``; scores: target -> ``[N]`` of its primary attack.
        level: with which all controls pass where they should.
    Returns: {"blind": {"auc", "interval", "passed"}, "targets": {name: {"members": {...}, "non_members": {...}}}}.
    """
    inside = int(members.sum())
    sides_of = (("members", members), ("non_members", ~members))
    with_blind = images is not None and min(inside, len(members) - inside) >= FEWEST
    count = with_blind + len(scores) * sum(int(mask.sum()) >= FEWEST_HALVED for _, mask in sides_of)
    level = 1 - (1 - level) / max(count, 1)
    controls: dict[str, Any] = {"blind": None, "targets": {}}
    if with_blind:
        value = blind(images, members, seed=seed)
        taken = ~value.isnan()
        controls["blind"] = _figures(roc(value[taken], members[taken]), level, one_sided=True)
    for name, value in scores.items():
        sides = {}
        for side, mask in sides_of:
            order = torch.randperm(int(mask.sum()), generator=seeds.generator(seed, "negative control", side))
            half = order < len(order) // 2
            # By score, so that where a record stands does not show in a digit.
            sides[side] = None if len(order) < FEWEST_HALVED else _figures(roc(value[mask].sort().values, half), level)
        controls["targets"][name] = sides
    return controls


def _figures(curve: Curve, level: float, one_sided: bool = False) -> dict[str, Any]:
    low, high = curve.auc_interval(level)
    return {"auc": curve.auc, "interval": [low, high], "passed": low <= 0.5 and (one_sided or high >= 0.5)}
