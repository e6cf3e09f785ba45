"""Fields of the configurations that commands take as flags, each with the range of its values."""

import dataclasses
import math
import numbers
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import described

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
    repeated: bool = False,
) -> Any:
    """A field with its help text and its range; in a field that is a tuple every value has to lie in it.

    Numbers are finite whatever the range. ``choices``: of a string. ``repeated``: a flag that may be given several
    times, each adding to a tuple; otherwise the last one counts.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"help": text, "limits": limits, "choices": choices, "repeated": repeated}
    return dataclasses.field(default=default, metadata=metadata)


def option_of(config: type, name: str, text: str | None = None) -> Any:
    """A field of ``config`` for another configuration: default and range stand in one place; ``text``: another help."""
    field = config.__dataclass_fields__[name]
    metadata = {**field.metadata, "help": text or field.metadata["help"]}
    return dataclasses.field(default=field.default, metadata=metadata)


def option_like(config: type, name: str, text: str, default: Any = None, **limits: float | None) -> Any:
    """A field with the default and range of the field ``name`` of ``config``, where no others are given."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    metadata = {"help": text, "limits": {**field.metadata["limits"], **limits}, "choices": field.metadata["choices"]}
    return dataclasses.field(default=field.default if default is None else default, metadata=metadata)


def in_groups(
    config: type, titles: Mapping[str, str] | None = None
) -> list[tuple[str, list["dataclasses.Field[Any]"]]]:
    """The fields of a configuration by the groups of its help, whose order a written configuration has too.

    ``config.FIRST`` names those that most users set, which come before all others; ``config.GROUPS`` names the field
    that begins a group, and its title. Fields of base classes follow the group that has ``data``, or come last.

    Args:
        titles: as ``config.GROUPS``, in place of them where both name a field.
    Returns: title and fields of each group that has any; fields before the first title have "".
    """
    first, titles = getattr(config, "FIRST", ()), {**getattr(config, "GROUPS", {}), **(titles or {})}
    bases = [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
    of_bases = {field.name for base in bases for field in dataclasses.fields(base)}
    every = {field.name: field for field in dataclasses.fields(config)}
    groups: list[tuple[str, list[dataclasses.Field[Any]]]] = [("most used", [every[name] for name in first]), ("", [])]
    inherited: list[tuple[str, list[dataclasses.Field[Any]]]] = [("", [])]
    behind = 0
    for name, field in every.items():
        where = inherited if name in of_bases else groups
        if name in titles:
            where.append((titles[name], []))
        if name == "data":
            behind = len(groups)
        if name not in first:
            where[-1][1].append(field)
    behind = behind or len(groups)
    return [(title, fields) for title, fields in groups[:behind] + inherited + groups[behind:] if fields]


def record(config: Any) -> dict[str, Any]:
    """A configuration without ``out`` as plain values, in the order of its help."""
    names = [field.name for _, fields in in_groups(type(config)) for field in fields if field.name != "out"]
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check(config: Any, where: str) -> None:
    """Convert the fields of a dataclass to their types; refuse the first that cannot be, or is outside its range.

    numpy's numbers become Python's, so that a configuration can be written as YAML and JSON; paths become strings,
    with ~ for the home folder, lists tuples. Fields of other types are left alone. Raises: UserError naming the field.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = converted(where, field.name, getattr(config, field.name), kinds[field.name])
        object.__setattr__(config, field.name, value)  # the dataclass is frozen
        for each in value if isinstance(value, tuple) else (value,):
            _check(where, field, each)


def converted(where: str, name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``: bool, int, float, str, a tuple of one of them, or a dataclass; UserError where it is not.

    A whole number is a float too, a fraction or a bool is no int; one string is a tuple of one, "" of none.
    """
    if typing.get_origin(kind) is tuple:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if typing.get_args(kind)[0] is str and isinstance(value, str | os.PathLike):
            value = (value,) if value else ()
        if not isinstance(value, list | tuple):
            fail(where, name, "be a list", _described(value))
        return tuple(converted(where, name, each, typing.get_args(kind)[0]) for each in value)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    is_bool = isinstance(value, bool | np.bool_)
    fits = {
        bool: is_bool,
        int: isinstance(value, numbers.Integral) and not is_bool,
        float: isinstance(value, numbers.Real) and not is_bool,
        str: isinstance(value, str),
    }
    if kind not in fits:
        if not dataclasses.is_dataclass(kind):
            return value
        fits[kind] = isinstance(value, kind)
    if not fits[kind]:
        fail(where, name, f"be of type {kind.__name__}", _described(value))
    if kind is str:  # a shell expands ~ in --out ~/runs, and in --out=~/runs and in YAML it does not
        return os.path.expanduser(value)
    try:
        return value if dataclasses.is_dataclass(kind) else kind(value)
    except OverflowError:  # an int that no float holds
        fail(where, name, "be finite", _described(value))


def within(field: dataclasses.Field) -> str:
    """The range of a field, for its help text: "in [0, 1)"; nothing where it has none."""
    low, high = _low(field.metadata.get("limits", {})), _high(field.metadata.get("limits", {}))
    return _rule(low, high).removeprefix("be ") if low or high else ""


def _check(where: str, field: dataclasses.Field, value: Any) -> None:
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        fail(where, field.name, f"be one of {', '.join(choices)}", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limits = field.metadata.get("limits", {})
    low, high = _low(limits), _high(limits)
    inside = (low is None or low[1](value)) and (high is None or high[1](value))
    large = isinstance(value, int) and not -LARGEST <= value <= LARGEST
    if not inside:
        fail(where, field.name, _rule(low, high), _described(value) if large else value)
    if isinstance(value, float) and not math.isfinite(value):
        fail(where, field.name, "be finite", value)
    if large:
        fail(where, field.name, f"be in [-{LARGEST}, {LARGEST}]", _described(value))


def _described(value: Any) -> str:
    """A value of the wrong kind or size: an array by its shape, and no integer of thousands of digits."""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:  # Python itself refuses to print some
        return f"an integer of {value.bit_length()} bits"
    return described(value) if isinstance(value, np.ndarray | Tensor) else repr(value)


def _low(limits: dict[str, Any]) -> tuple | None:
    """(text alone, test, text before the comma of an interval)."""
    if (least := limits.get("least")) is not None:
        return f"at least {least:.12g}", lambda value: value >= least, f"[{least:.12g}"
    if (above := limits.get("above")) is not None:
        return f"above {above:.12g}", lambda value: value > above, f"({above:.12g}"
    return None


def _high(limits: dict[str, Any]) -> tuple | None:
    if (most := limits.get("most")) is not None:
        return f"at most {most:.12g}", lambda value: value <= most, f"{most:.12g}]"
    if (below := limits.get("below")) is not None:
        return f"below {below:.12g}", lambda value: value < below, f"{below:.12g})"
    return None


def _rule(low: tuple | None, high: tuple | None) -> str:
    if low and high:
        return f"be in {low[2]}, {high[2]}"
    return f"be {(low or high)[0]}"
