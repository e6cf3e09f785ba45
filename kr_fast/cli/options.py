"""One dataclass as flags and as a YAML file."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from kr_fast.runtime.errors import UserError, fail


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for each field; a flag that is not given leaves the value to ``--config``, the preset or the default."""
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
        }
        kind = kinds[field.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"type": typing.get_args(kind)[0], "nargs": "*", "metavar": "X"}
        else:
            options |= {"type": kind, "metavar": field.name.split("_")[-1].upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def build(config: type, *layers: dict[str, Any], where: str) -> Any:
    """The dataclass from layers of values, the last winning; an unknown key or a value of another kind is refused."""
    kinds, values = typing.get_type_hints(config), {}
    for layer in layers:
        for name, value in layer.items():
            if name not in kinds:
                fail(where, "config", "hold known keys only", name)
            values[name] = _convert(where, name, value, kinds[name])
    return config(**values)


def _convert(where: str, name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            fail(where, name, "be a list", repr(value))
        return tuple(_convert(where, name, each, typing.get_args(kind)[0]) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        fail(where, name, f"be of type {kind.__name__}", repr(value))
    return value


def read_yaml(path: str | None, where: str) -> dict[str, Any]:
    """The mapping of a YAML file, or nothing without a path."""
    if path is None:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: config must be a YAML file, got {path} ({error})") from error
    if not isinstance(found, dict):
        fail(where, "config", "be a YAML mapping", path)
    return found
