"""How golden.py records: names looked up wherever they lie, numbers drawn from seeds, values brought to a hash."""

import dataclasses
import functools
import hashlib
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kr_fast

LONGEST = 300  # letters of a value that is shown as it is
# Places in a text that no two recordings have alike.
VOLATILE = ((r"0x[0-9a-f]+", "0x"), (r"[\d.,]+ (images/s|s so far|s left|seconds)", "N"), (r"seconds +\d+", "N"))
Cases = Iterator[tuple[str, Callable[[], Any]]]


class Missing(Exception):
    """A public name that is nowhere any more."""


@functools.cache
def modules(package: str) -> list[str]:
    """Names of all modules below a package, wherever they lie, in folders without ``__init__.py`` too."""
    top = Path(importlib.import_module(package).__path__[0])
    paths = (path.relative_to(top).with_suffix("") for path in sorted(top.rglob("*.py")))
    return [".".join((package, *path.parts)) for path in paths if path.name != "__init__"]


def find(module: str, name: str, package: str = "kr_fast.ops") -> Any:
    """``name`` of the module called ``module`` below ``package``, else of any module there that defines it."""
    if package == "kr_fast.ops" and name in kr_fast.__all__:
        return getattr(kr_fast, name)
    names = modules(package)
    for each in sorted(names, key=lambda path: path.rsplit(".", 1)[1] != module):
        value = getattr(importlib.import_module(each), name, None)
        if value is not None and not isinstance(value, type(torch)):
            return value
    raise Missing(f"{module}.{name}")


def public(package: str) -> list[str]:
    """The public names of a package."""
    return sorted(importlib.import_module(package).__all__)


def get(package: str, name: str) -> Any:
    """A public name."""
    try:
        return getattr(importlib.import_module(package), name)
    except AttributeError:
        raise Missing(f"{package}.{name}") from None


class Lazy:
    """The public names of a package as functions that are looked up when they are called."""

    def __init__(self, package: str):
        self.package = package

    def __getattr__(self, name: str) -> Callable:
        return lambda *given, **options: get(self.package, name)(*given, **options)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every dtype, but for their rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers in [0, high)."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Recorder(logging.Handler):
    """Names to what was found, and what was logged; ``folder`` is a temporary one, which no text shows."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.entries, self.messages = folder, {}, set()

    def add(self, name: str, call: Callable[[], Any]) -> None:
        """What ``call`` returns or raises."""
        if name in self.entries:
            raise ValueError(f"golden: name must be used once, got {name}")
        self.entries[name] = self.short(outcome(call))

    def add_all(self, section: str, cases: Iterator[tuple[str, Callable[[], Any]]]) -> None:
        """Every case of a section; if the section itself breaks, that is told and its other names are missing."""
        try:
            for name, call in cases:
                self.add(f"{section}/{name}", call)
        except Exception as error:
            self.entries[f"{section}/"] = self.text(f"broken: {error!r}")

    def emit(self, record: logging.LogRecord) -> None:
        """A message of the package."""
        self.messages.add(record.getMessage())

    def short(self, value: Any) -> str:
        """The value itself if it is short, else a hash of its canonical form."""
        parts = list(self.parts(value))
        text = " ".join(part for part in parts if isinstance(part, str))
        if len(text) <= LONGEST and all(isinstance(part, str) for part in parts):
            return text
        whole = hashlib.sha256()
        for part in parts:
            whole.update(part.encode() if isinstance(part, str) else part)
            whole.update(b"\0")
        return whole.hexdigest()

    def text(self, text: str) -> str:
        text = text.replace(str(self.folder), "FOLDER")
        for pattern, instead in VOLATILE:
            text = re.sub(pattern, instead, text)
        return text

    def parts(self, value: Any) -> Iterator[str | bytes]:
        """The canonical form: tensors by dtype, shape, layout and bytes, floats by repr, the rest by its parts."""
        if isinstance(value, Tensor):
            value = value.detach()
            layout = "" if value.is_contiguous() else " strided"
            yield f"{value.dtype} {list(value.shape)}{layout}"
            yield value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype} {list(value.shape)}"
            yield np.ascontiguousarray(value).tobytes()
        elif isinstance(value, bytes | bytearray):
            yield bytes(value)
        elif isinstance(value, str | Path):
            yield self.text(str(value))
        elif isinstance(value, Exception):
            first = (str(value).strip().splitlines() or [""])[0]
            yield self.text(f"{type(value).__name__}: {first}")
        elif isinstance(value, torch.nn.Module):
            yield type(value).__name__
            yield from self.parts(value.state_dict())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield type(value).__name__
            yield from self.parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif hasattr(value, "_asdict"):
            yield type(value).__name__
            yield from self.parts(value._asdict())
        elif isinstance(value, Mapping):
            yield "{"
            for key in sorted(value, key=str):
                yield self.text(f"{key}:")
                yield from self.parts(value[key])
            yield "}"
        elif isinstance(value, Sequence | set):
            yield "["
            for each in sorted(value) if isinstance(value, set) else value:
                yield from self.parts(each)
            yield "]"
        else:
            yield self.text(repr(value))


def outcome(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or what it raises."""
    try:
        return call()
    except Missing as error:
        return f"missing: {error}"
    except Exception as error:
        return error
