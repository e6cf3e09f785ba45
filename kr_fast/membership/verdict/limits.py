"""The limits of the verdict: those of the default rules, and those that a user asks for by the path of a figure."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option

# Options of the commands that are no part of what was run: the same figures are held against other limits.
MOVABLE = ("fail_above", "verdict_auc", "verdict_records", "verdict_controls", "verdict_gap")


class Gate(NamedTuple):
    """A figure that must not be above a limit, as ``--fail-above PATH=LIMIT`` asks for it."""

    path: str
    limit: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the verdict of an audit allows. ``Limits(auc=0.6, fail_above=("target.records=0",))``

    Args:
        auc: largest upper end of an interval of an AUC, in [0.5, 1].
        records: how many single records may be found.
        controls: the verdict is *share* only if the negative controls passed and a positive control was detected.
        fail_above: further limits, each ``PATH=LIMIT``: see docs/audit/verdict.md.
    Raises: UserError naming the field.
    """

    auc: float = option(0.55, "verdict: largest upper end of the interval of an AUC", least=0.5, most=1)
    records: int = option(0, "verdict: single records that may be found", least=0, most=1_000_000_000)
    controls: bool = option(
        True, "verdict: share only if negative controls passed and the positive control is detected"
    )
    fail_above: tuple[str, ...] = option(
        (),
        "PATH=LIMIT, such as target.auc_high=0.55: exit code 3 if that figure of the JSON is above it or was not "
        "computed; may be given several times; docs/audit/verdict.md lists the paths",
        repeated=True,
    )

    def __post_init__(self):
        check(self, "audit")
        gates("audit", self.fail_above)


def limits_of(config: Any) -> Limits:
    """The limits in the configuration of a command."""
    return Limits(config.verdict_auc, config.verdict_records, config.verdict_controls, config.fail_above)


def gates(where: str, given: Sequence[str]) -> list[Gate]:
    """``PATH=LIMIT`` of each text. Raises: UserError naming the one that is not of that form."""
    read: list[Gate] = []
    for text in given:
        path, _, number = text.rpartition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        path = path.strip()
        if not path or not math.isfinite(limit):
            fail(where, "fail_above", "be PATH=LIMIT with a finite number, such as target.auc_high=0.55", repr(text))
        if path in (gate.path for gate in read):
            fail(where, "fail_above", "hold each path once", path)
        read.append(Gate(path, limit))
    return read
