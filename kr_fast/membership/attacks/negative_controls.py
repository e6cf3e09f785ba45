"""Negative controls: attacks that must not succeed. Where one does, the two sides differ without any leakage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kr_fast.membership.attacks.blind import FEWEST, blind
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.membership.statistics.groups import Groups
from kr_fast.runtime import seeds
from kr_fast.runtime.storage.image_rows import Images

FEWEST_HALVED = 4  # examples of a side whose halves are told apart


def negative_controls(
    images: Images | None,
    members: Tensor,
    scores: Mapping[str, Tensor],
    *,
    groups: Any = None,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The AUC of each control with its interval, and whether it passed.

    - ``blind``: membership from the images alone, :func:`kr_fast.membership.blind`. It passes if its interval does not
      lie above 0.5, and is None without images or with fewer than 10 examples on a side.
    - ``members`` and ``non_members`` of each target: one half of a side, drawn by chance, against the other half by
      the very scores of the attack. It passes if 0.5 lies in its interval; None with fewer than 4 examples.

    The intervals share the error of ``level`` (Bonferroni): where nothing differs, all controls pass together with that
    probability at least, however many targets there are. With groups (the images of a patient, a site) these are what
    is told apart, halved and counted, by their mean score; groups of members and others are left out.

    Args:
        images: uint8 ``[N, H, W, C]`` or None; members: bool ``[N]``; scores: target -> ``[N]`` of its primary attack.
        groups: ``[N]`` integers or texts, or None.
        level: with which all controls pass where they should.
        seed: of the halves.
    Returns: {"blind": {"auc", "interval", "passed"}, "targets": {name: {"members": {...}, "non_members": {...}}}}.
    """
    units = None if groups is None else Groups.of(groups)
    belongs = members if units is None else units.units(members.double(), members)[1]
    inside = int(belongs.sum())
    sides_of = (("members", belongs), ("non_members", ~belongs))
    with_blind = images is not None and min(inside, len(belongs) - inside) >= FEWEST
    count = with_blind + len(scores) * sum(int(mask.sum()) >= FEWEST_HALVED for _, mask in sides_of)
    level = 1 - (1 - level) / max(count, 1)
    controls: dict[str, Any] = {"blind": None, "targets": {}}
    if with_blind:
        value = blind(images, members, groups=groups, seed=seed)
        taken = ~value.isnan()
        pair = value[taken], members[taken]
        pair = pair if units is None else Groups.of(units.at[taken]).units(*pair)
        controls["blind"] = _figures(roc(*pair), level, one_sided=True)
    for name, value in scores.items():
        sides = {}
        value = value if units is None else units.units(value, members)[0]
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
