"""The risk of each record as a table, and what of it may leave: numbers of classes and groups, no single record."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.attacks.scores import query_mean
from kr_fast.membership.inputs.data import AuditData
from kr_fast.membership.statistics.records import RecordRisk, by_label, record_risk, summary
from kr_fast.runtime.reprs import ShortRepr

LEAST_GROUP = 10  # records of a group that is named in figures that may leave
COLUMNS = (
    "index", "label", "group", "member", "score", "advantage", "low", "high", "p", "q", "holm", "inside", "outside",
)  # fmt: skip
OTHERS = "all others"


@dataclasses.dataclass(frozen=True, repr=False)
class RecordTable(ShortRepr):
    """The risk of each record under one recipe: that of a set of shadows.

    Args:
        risk: see :class:`kr_fast.membership.RecordRisk`, in the order of the pool.
        index: int64 ``[N]``, the record's number in the user's data.
        labels, groups, members: ``[N]`` or None.
        scores: float64 ``[N]``, of the primary attack on the first target that has these shadows, or None.
        level: coverage of the intervals; seed: of their bootstrap.
        named: whether figures that may leave tell large groups by name. What a run numbers may be a person.
    """

    risk: RecordRisk
    index: np.ndarray
    labels: np.ndarray | None
    groups: np.ndarray | None
    members: np.ndarray | None
    scores: np.ndarray | None
    level: float
    seed: int
    named: bool = True

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> list[dict[str, Any]]:
        """One row a record, the smallest p first: the keys are :data:`COLUMNS`; what is not known is None."""
        risk = self.risk
        columns = {"index": self.index, "label": self.labels, "group": self.groups, "member": self.members}
        columns |= {"score": self.scores, "advantage": risk.advantage, "low": risk.interval[:, 0]}
        columns |= {"high": risk.interval[:, 1], "p": risk.p, "q": risk.q, "holm": risk.holm}
        columns |= {"inside": risk.inside, "outside": risk.outside}
        order = np.argsort(risk.p, kind="stable")
        values = {name: [None] * len(self) if each is None else each[order].tolist() for name, each in columns.items()}
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        return [{name: None if each != each else each for name, each in row.items()} for row in rows]  # NaN

    @functools.cached_property
    def figures(self) -> dict[str, Any]:
        """What names no record: totals, and classes and groups of at least :data:`LEAST_GROUP` records by name."""
        values = summary(self.risk)
        options = {"clusters": self.groups, "level": self.level, "seed": self.seed}
        found = self.risk.found()
        for name, each in (("classes", self.labels), ("groups", self.groups)):
            values[name] = None
            if each is not None:
                named, at, sizes = np.unique(each, return_inverse=True, return_counts=True)
                named = np.where(sizes < LEAST_GROUP, OTHERS, named.astype(str))[at]
                with_found = int(np.bincount(at, found).astype(bool).sum())
                rows = by_label(self.risk, named, **options) if self.named or name == "classes" else []
                values[name] = {"count": len(sizes), "with_found": with_found, "rows": rows}
        return values


def unnamed(tables: Mapping[str, RecordTable]) -> dict[str, RecordTable]:
    """The tables, whose figures count groups and name none."""
    return {name: dataclasses.replace(table, named=False) for name, table in tables.items()}


def as_csv(tables: Mapping[str, RecordTable]) -> str:
    """The rows of all tables as text; the first column names the set of shadows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("shadows", *COLUMNS), lineterminator="\n")
    writer.writeheader()
    for name, table in tables.items():
        writer.writerows({"shadows": name, **row} for row in table.rows())
    return text.getvalue()


def record_tables(
    data: AuditData, scores: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], level: float, seed: int
) -> dict[str, RecordTable]:
    """Set of shadows -> the risk of each record, for sets that a target is attacked with, or for all without one.

    Args:
        scores: target -> attack -> ``[N]``; facts: of the targets, with the primary attack of each.
    """
    attacked = {name: each for name, each in data.targets.items() if not each.control}
    used = {each.shadows for each in attacked.values()} or set(data.shadows)
    tables = {}
    for name, shadows in data.shadows.items():
        if name not in used:
            continue
        target = next((at for at, each in attacked.items() if each.shadows == name and each.kind == "full"), None)
        value = None if target is None else scores[target][facts[target]["primary"]].numpy()
        risk = record_risk(query_mean(shadows.signals["phi"]).T, shadows.keep, level=level)
        labels, members = (None if each is None else each.numpy() for each in (data.labels, data.members))
        index = np.arange(data.count) if data.index is None else data.index.numpy()
        tables[name] = RecordTable(risk, index, labels, data.groups, members, value, level, seed)
    return tables
