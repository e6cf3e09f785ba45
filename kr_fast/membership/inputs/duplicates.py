"""Images that lie on both sides, as members and as non-members, whole or nearly: counted, and left out on request."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from kr_fast.data import shared_images
from kr_fast.data.distances import SHARE, spacing, within
from kr_fast.membership.inputs.data import AuditData, ShadowSignals, TargetSignals
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images, as_mask
from kr_fast.runtime.storage.image_rows import Images, hash_images, rows_of

MOST_KEPT = 4  # a run asks for two: test images against all others, and members against non-members
_KEPT: dict[bytes, "Duplicates"] = {}  # by digest of the last images: several runs on one set compare them once


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Which examples of the pool occur on the other side too.

    Args:
        exact: bool ``[N]``, byte-equal to an image of the other side.
        near: bool ``[N]``, within ``threshold`` of one of them; byte-equal ones too.
        spacing: median distance between neighbours of the larger side; threshold: a quarter of it. Both are root mean
            square differences in grey levels.
    """

    exact: Tensor
    near: Tensor
    spacing: float

    @property
    def threshold(self) -> float:
        """The largest distance of two near-duplicates."""
        return SHARE * self.spacing


def duplicates_across(images: Images, members: Tensor) -> Duplicates:
    """Find the images of the pool that are on both sides.

    Two images are near-duplicates if the root mean square difference of their pixels is at most a quarter of the median
    distance between an image and its nearest neighbour on one side (the larger one): so near are copies that were
    compressed again, or neighbouring frames, and hardly ever two pictures that only look alike, whatever the data are.

    Args:
        images: uint8 ``[N, H, W, C]``; members: bool ``[N]``, of which some are and some are not.
    Raises: UserError naming the argument.
    Source: of the danger: Barz and Denzler, "Do We Train on Test Data?", Journal of Imaging 6 (2020). The threshold is
        this package's: docs/audit/statistics.md says what it finds.
    """
    images = as_images("duplicates_across", "images", images).cpu()
    members = as_mask("duplicates_across", "members", members, 1).cpu()
    if len(members) != len(images) or not 0 < int(members.sum()) < len(members):
        rule = f"be bool [{len(images)}] with members and others"
        fail("duplicates_across", "members", rule, f"{int(members.sum())} of {len(members)}")
    digest = hashlib.sha256(str(list(images.shape)).encode())
    hash_images(digest, images)
    digest.update(members.contiguous().numpy().data)
    if (key := digest.digest()) not in _KEPT:
        if len(_KEPT) == MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _across(images, members)
    return _KEPT[key]


def _across(images: Images, members: Tensor) -> Duplicates:
    sides = {True: rows_of(images, members), False: rows_of(images, ~members)}
    exact, near = torch.zeros_like(members), torch.zeros_like(members)
    larger = sides[len(sides[True]) >= len(sides[False])]
    gap = spacing(larger) if len(larger) > 1 else 0.0
    exact[members], exact[~members] = (shared_images(sides[side], sides[not side]) for side in (True, False))
    near[members], near[~members] = within(sides[True], sides[False], SHARE * gap)
    return Duplicates(exact, near, gap)


def apart(data: AuditData, leave_out: bool) -> tuple[AuditData, dict[str, Any] | None]:
    """(the audit's data, without near-duplicates on request, plain figures of them or None without images or members).

    Figures: "exact" and "near" ("members", "non_members": how many; near ones hold exact ones), "threshold", "spacing",
    "left_out" (bool). Raises: UserError where they are to be left out and there are no images, or all of a side are.
    """
    if data.images is None or data.members is None:
        if leave_out:
            lacks = "images" if data.images is None else "members"
            fail("audit", "leave_out_duplicates", f"be left out without {lacks}, which it compares", True)
        return data, None
    found = duplicates_across(data.images, data.members)
    counts = {
        name: {"members": int(mask[data.members].sum()), "non_members": int(mask[~data.members].sum())}
        for name, mask in (("exact", found.exact), ("near", found.near))
    }
    figures = {**counts, "threshold": found.threshold, "spacing": found.spacing, "left_out": leave_out}
    return without(data, found.near) if leave_out and bool(found.near.any()) else data, figures


def warnings_of_duplicates(figures: dict[str, Any] | None) -> list[str]:
    """What has to be said of near-duplicates that were attacked, as clauses; equal images have a line of their own."""
    if figures is None or figures["left_out"] or figures["near"] == figures["exact"]:
        return []
    near = figures["near"]
    return [
        f"{near['members']} members and {near['non_members']} non-members are near-duplicates of each other (within "
        f"{figures['threshold']:.1f} grey levels): what a model knows of the one shows on the other, which pulls every "
        "figure towards chance; leave_out_duplicates leaves them out"
    ]


def without(data: AuditData, mask: Tensor) -> AuditData:
    """The audit's data without the examples under the mask ``[N]``. Raises: UserError if a side would be empty."""
    at = (~mask).nonzero()[:, 0]
    for name, side in (("members", data.members), ("non-members", ~data.members)):
        if bool(mask[side].all()):
            rule = f"leave some {name}, all {int(side.sum())} of whom are near-duplicates of the other side"
            fail("audit", "leave_out_duplicates", rule, True)
    shadows = {name: _shadows_at(each, at) for name, each in data.shadows.items()}
    targets = {name: _target_at(each, at) for name, each in data.targets.items()}
    index = at if data.index is None else data.index[at]
    groups = None if data.groups is None else data.groups[at.numpy()]
    parts = {name: getattr(data, name) for name in ("members", "labels", "images", "features")}
    parts = {name: None if value is None else rows_of(value, at) for name, value in parts.items()}
    return dataclasses.replace(data, shadows=shadows, targets=targets, index=index, groups=groups, **parts)


def _shadows_at(shadows: ShadowSignals, at: Tensor) -> ShadowSignals:
    signals = {name: value[:, at] for name, value in shadows.signals.items()}
    answers = None if shadows.answers is None else shadows.answers[at]
    partner = None if shadows.partner is None else shadows.partner[:, at]
    return dataclasses.replace(shadows, keep=shadows.keep[:, at], signals=signals, answers=answers, partner=partner)


def _target_at(target: TargetSignals, at: Tensor) -> TargetSignals:
    signals = {name: value[:, at] for name, value in target.signals.items()}
    return dataclasses.replace(target, signals=signals, answers=None if target.answers is None else target.answers[at])
