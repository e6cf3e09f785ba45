"""Fields of the configurations that commands show as flags."""

import dataclasses
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})
