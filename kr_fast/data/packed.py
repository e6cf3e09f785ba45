"""Encoded images inside larger files: a member of a tar file, a row of a table."""

import dataclasses
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Packed:
    """An image to read as if it were a file: ``name`` stands in messages, ``content`` returns its bytes.

    ``content`` may raise what readers of damaged files raise (``runtime.array_files.DAMAGE``).
    """

    name: str
    content: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageFile = Path | Packed
