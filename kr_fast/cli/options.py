"""One dataclass as flags and as a YAML file."""

import argparse
import contextlib
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kr_fast.cli.parser import add_common, did_you_mean
from kr_fast.runtime.array_files import regular_file
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.options import converted, in_groups, within
from kr_fast.runtime.storage.manifest import YAML_ERRORS


def add_flags(parser: argparse.ArgumentParser, config: type, command: Any = None) -> None:
    """``--config``, a flag for each field, and the flags of every command.

    A flag that is not given leaves the value to ``--config``, the preset or the default. Groups and their order are
    those of :func:`kr_fast.runtime.options.in_groups`.

    Args:
        command: a :class:`kr_fast.recycling.commands.Command` with only some of the fields; None for all of them.
    """
    parser.usage = "%(prog)s [options]"
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file with any of the options below")
    kinds, defaults = typing.get_type_hints(config), command.defaults if command is not None else {}
    for title, fields in in_groups(config, command.titles if command is not None else None):
        known = [field for field in fields if "help" in field.metadata]
        known = [field for field in known if command is None or field.name in command.options]
        if known:
            group = parser.add_argument_group(title) if title else parser
            for field in known:
                _add_flag(group, field, kinds[field.name], defaults.get(field.name, field.default))
    add_common(parser)


def _add_flag(group: Any, field: "dataclasses.Field[Any]", kind: Any, default: Any) -> None:
    """The flag of one field, whose help tells default and range."""
    note = "; ".join(filter(None, [f"default: {_told(default)}", within(field)]))
    options: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": f"{field.metadata['help']} ({note})".replace("%", "%%"),
    }
    choices = field.metadata.get("choices")
    metavar = f"{{{','.join(choices)}}}" if choices else field.name.split("_")[-1].upper()
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        options |= {"type": _READERS[typing.get_args(kind)[0]], "nargs": "*", "metavar": "X"}
        options |= {"action": "extend"} if field.metadata.get("repeated") else {}
    else:
        options |= {"type": _READERS[kind], "metavar": metavar}
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _told(value: Any) -> str:
    """A default as it is typed; "none" for an empty one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_told, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


# Presets that go with another one, by what they need: a Student, and a whole run.
OF_STUDENTS = (
    "with private, for a Student that leaked less where it was measured (no guarantee): small,private; with accurate, "
    "for one that learns longer"
)
OF_RUNS = "with guaranteed, for differential privacy: small,guaranteed"


def add_preset(parser: argparse.ArgumentParser, *methods: str) -> None:
    """``--preset`` and ``--dry-run`` of the commands that make a run or a part of one.

    Args:
        methods: what can be said of presets beside those for kinds of images.
    """
    words = "; ".join(["digits, small (28 px on a small machine) or toy", *methods])
    parser.add_argument("--preset", default=None, help=words)
    words = "check everything, print the configuration and an estimate of time, memory and disk; write nothing"
    parser.add_argument("--dry-run", action="store_true", help=words)


def _integer(text: str) -> int:
    """An integer, also as ``1e6``; anything else is the ValueError that argparse expects."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


_integer.__name__ = "int"  # argparse's errors name the function
_READERS = {int: _integer, float: float, str: str}


def config_from(
    arguments: argparse.Namespace,
    config: type,
    where: str,
    preset: Callable[[str], dict[str, Any]] | None = None,
    command: Any = None,
    implied: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """The configuration of a command: flags over the file of ``--config``, over the preset, over the defaults.

    Args:
        preset: name -> values, for a command with ``--preset``, which a file may give too.
        implied: values given -> what follows from them, over the preset and below what is given by itself.
        command: as of :func:`add_flags`; the file may be one of ``kr-fast run``, whose other options are left out.
    Raises: UserError naming the option.
    """
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    names, file, base = usual.keys(), read_yaml(arguments.config, where), {}
    if "command" in names and (of := file.pop("command", where)) not in (where, "run"):
        fail(where, "config", f"be of kr-fast {where}", f"{arguments.config}, which is of kr-fast {of}")
    if preset is not None:
        in_file = file.pop("preset", None)
        name = in_file if arguments.preset is None else arguments.preset
        base = {} if name is None else preset(name)
    if command is not None:
        command.refuse(base)
        base = {name: value for name, value in base.items() if name in command.options} | dict(command.defaults)
        file = command.used(file, usual)
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    if implied is not None:
        base |= implied({**base, **file, **flags})
    return build(config, base, file, flags, where=where)


def build(config: type, *layers: dict[str, Any], where: str) -> Any:
    """The dataclass from layers of values, of which the last counts; an unknown key or a wrong type is refused."""
    kinds, values = typing.get_type_hints(config), {}
    known = [field.name for field in dataclasses.fields(config)]
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                fail(where, "config", "hold known keys only", f"{name}{did_you_mean(str(name), known)}")
            values[name] = converted(where, name, _read(value, kinds[name]), kinds[name])
    return config(**values)


def _read(value: Any, kind: Any) -> Any:
    """Numbers that YAML 1.1 reads as text, such as 1e-3, and integers with a point, 1.0e+3; all else as it is."""
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return [_read(each, typing.get_args(kind)[0]) for each in value]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError, OverflowError):
            return _READERS[kind](value)
    return value


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice: the first value would be lost unnoticed."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # <<, whose keys those of this mapping replace
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"the key {twice} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | None, where: str) -> dict[str, Any]:
    """The mapping of a YAML file, dashes in keys as underscores; empty without a path or for an empty file."""
    if path is None:
        return {}
    if not path:
        fail(where, "config", "be a YAML file", repr(path))
    regular_file(Path(path), f"{where}: config")
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except YAML_ERRORS as error:
        why = " ".join(str(error).split())
        raise UserError(f"{where}: config must be a YAML file, got {path} ({why})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        fail(where, "config", "be a YAML mapping", path)
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        fail(where, "config", "hold each key once, with dashes or underscores", path)
    return named
