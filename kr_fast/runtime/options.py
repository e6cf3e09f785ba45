"""Fields of the configurations that commands show as flags, each with the values that it may have."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kr_fast.runtime.errors import fail

LARGEST = 2**63 - 1  # of an integer: what an int64 holds


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field with its help text and its range; in a field that is a tuple every value has to lie in it.

    Numbers are finite whatever the range. ``choices``: of a string.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    return dataclasses.field(default=default, metadata={"help": text, "limits": limits, "choices": choices})


def check(config: Any, where: str) -> None:
    """Refuse the first field of a dataclass that is outside its range. Raises: UserError naming it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for each in value if isinstance(value, tuple | list) else (value,):
            _check(where, field, each)


def _check(where: str, field: dataclasses.Field, value: Any) -> None:
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        fail(where, field.name, f"be one of {', '.join(choices)}", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limits = field.metadata.get("limits", {})
    low, high = _low(limits), _high(limits)
    inside = (low is None or low[1](value)) and (high is None or high[1](value))
    if not inside:
        fail(where, field.name, _rule(low, high), value)
    if isinstance(value, float) and not math.isfinite(value):
        fail(where, field.name, "be finite", value)
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        fail(where, field.name, f"be at most {LARGEST}", value)


def _low(limits: dict[str, Any]) -> tuple | None:
    """(text alone, test, text before the comma of an interval)."""
    if (least := limits.get("least")) is not None:
        return f"at least {least:g}", lambda value: value >= least, f"[{least:g}"
    if (above := limits.get("above")) is not None:
        return f"above {above:g}", lambda value: value > above, f"({above:g}"
    return None


def _high(limits: dict[str, Any]) -> tuple | None:
    if (most := limits.get("most")) is not None:
        return f"at most {most:g}", lambda value: value <= most, f"{most:g}]"
    if (below := limits.get("below")) is not None:
        return f"below {below:g}", lambda value: value < below, f"{below:g})"
    return None


def _rule(low: tuple | None, high: tuple | None) -> str:
    if low and high:
        return f"be in {low[2]}, {high[2]}"
    return f"be {(low or high)[0]}"
