"""Membership counted by group: was any image of this patient (site, family) in the training set?

The images of one person are alike, so what a model knows of one shows on the others, and intervals that take images as
independent are too narrow. Here a group is one unit: its score is the mean over its images, and it is a member where
all of these are.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.attacks.scores import BOUND, query_mean
from kr_fast.membership.audit.figures import describe
from kr_fast.membership.audit.recipe import across_targets
from kr_fast.membership.inputs.data import AuditData
from kr_fast.membership.statistics.curve import roc
from kr_fast.membership.statistics.groups import Groups
from kr_fast.membership.statistics.records import RecordRisk, record_risk, summary

FPRS = (0.1, 0.01)


def group_risk(data: AuditData, *, level: float = 0.95) -> dict[str, RecordRisk]:
    """Set of shadows -> :func:`kr_fast.membership.record_risk` of each group, in the order of their names.

    The test stays exact: where halves are drawn by group, whether a shadow holds a group is one coin. Sets whose
    shadows hold a part of some group are left out.
    """
    groups, risks = Groups.of(data.groups), {}
    for name, shadows in data.shadows.items():
        keep, mixed = groups.shared(shadows.keep)
        if not mixed.any():
            phi = query_mean(shadows.signals["phi"]).T.clamp(-BOUND, BOUND)
            risks[name] = record_risk(groups.mean(phi), keep, level=level)
    return risks


def by_group(
    data: AuditData,
    scores: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    lone: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    risks: Mapping[str, RecordRisk],
    primary: str,
    level: float,
) -> dict[str, Any]:
    """What an audit finds with groups as units.

    Args:
        data: with groups.
        scores: target or released set -> attack -> ``[N]``; facts: with the "primary" attack of each.
        lone: set of shadows -> attack -> (scores ``[K, N]``, keep) of its models, each attacked from the others.
        risks: of :func:`group_risk`; primary: of the audit.
    Returns: {"groups", "images_in_largest", "members", "non_members", "mixed" (groups of members and others, which are
        left out; None each without members), "targets": {name: {"attack", figures of it}}, "recipes":
        {set: {"auc": of :func:`across_targets`}}, "records": {set: :func:`summary` of the risks}}.
    """
    groups = Groups.of(data.groups)
    values: dict[str, Any] = {"groups": len(groups.names), "images_in_largest": int(groups.sizes.max())}
    values |= dict.fromkeys(("members", "non_members", "mixed"))
    rows: dict[str, Any] = {}
    if data.members is not None:
        inside, mixed = groups.shared(data.members)
        outside = ~inside & ~mixed
        values |= {"members": int(inside.sum()), "non_members": int(outside.sum()), "mixed": int(mixed.sum())}
        for name, each in scores.items():
            attack = facts[name]["primary"]
            mean, members = groups.units(each[attack], data.members)
            if members.any() and not members.all() and not mean.isnan().any():
                rows[name] = {"attack": attack, **describe(roc(mean, members), level, FPRS)}
    recipes = {}
    for name, each in lone.items():
        if name in risks and primary in each:
            keep, _ = groups.shared(each[primary][1])
            usable = keep.any(1) & ~keep.all(1)
            if usable.any():
                found = across_targets(groups.mean(each[primary][0])[usable], keep[usable], (), level)
                recipes[name] = {"targets": found["targets"], "auc": found["auc"]}
    return {**values, "targets": rows, "recipes": recipes, "records": {n: summary(each) for n, each in risks.items()}}


COLUMNS = ("shadows", "group", "images", "member", "advantage", "low", "high", "p", "q", "holm", "inside", "outside")


def as_csv(data: AuditData, risks: Mapping[str, RecordRisk]) -> str:
    """The risk of each group as text, the smallest p of each set of shadows first."""
    groups, text = Groups.of(data.groups), io.StringIO()
    members = None if data.members is None else groups.shared(data.members)[0].tolist()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, risk in risks.items():
        columns = (risk.advantage, *risk.interval.T, risk.p, risk.q, risk.holm, risk.inside, risk.outside)
        for at in np.argsort(risk.p, kind="stable").tolist():
            rest = [each[at].item() for each in columns]
            known = [name, groups.names[at], int(groups.sizes[at]), "" if members is None else members[at]]
            writer.writerow([*known, *("" if each != each else each for each in rest)])
    return text.getvalue()
