"""Rows of parquet files and of the arrow files of ``save_to_disk``, by pyarrow: a column whole, an image at a time."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.data.packed import Packed
from kr_fast.data.printable import printable
from kr_fast.data.readers.table_file import import_parquet
from kr_fast.runtime.array_files import DAMAGE, other_format_of
from kr_fast.runtime.errors import UserError, fail, first_line

ERRORS = (*DAMAGE, LookupError)  # of pyarrow on damaged files
KEPT = 2  # row groups


class ArrowFile:
    """The file at ``path``: parquet, or a stream of arrow. Raises: UserError naming it where it cannot be read."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._recent: dict[tuple[int, str], Any] = {}
        reader = import_parquet(f"{path.suffix} files")
        self._is_parquet = path.suffix.lower() == ".parquet"
        try:
            if self._is_parquet:
                self._parquet = reader.ParquetFile(path)
                self.schema, metadata = self._parquet.schema_arrow, self._parquet.metadata
                counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            else:
                self._batches, self.schema = _stream(path)
                counts = [batch.num_rows for batch in self._batches]
            ends = np.cumsum(counts, dtype=np.int64).tolist()
            self._rows = [(end - count, count) for end, count in zip(ends, counts, strict=True)]
        except ERRORS as error:
            raise self._damaged(error) from error
        self.names = list(self.schema.names)

    def features(self) -> dict[str, dict[str, Any]]:
        """Column -> its feature of the package ``datasets``, such as ``{"_type": "ClassLabel", "names": [...]}``."""
        try:
            info = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            features = info.get("info", {}).get("features", {})
            return {name: each for name, each in features.items() if isinstance(each, dict)}
        except (ValueError, AttributeError) as error:
            raise self._damaged(error) from error

    def values(self, column: str) -> list[Any]:
        """All values of a column."""
        try:
            return [value for part in self._parts(column) for value in part.to_pylist()]
        except OverflowError as error:  # a date that Python does not have
            raise self._damaged(error) from error

    def images(self, column: str) -> list[Packed]:
        """The encoded images of a column of bytes, of paths, or of ``{"bytes", "path"}``, none of which is read yet."""
        return [
            Packed(f"{self.path.name}, row {first + row}", _Cell(self, group, column, row))
            for group, (first, count) in enumerate(self._rows)
            for row in range(count)
        ]

    def holds_encoded(self, column: str) -> bool:
        """Whether :meth:`images` can read the column."""
        import pyarrow

        kind = self.schema.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if pyarrow.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)  # in any order, as other writers have it
        return str(kind).startswith(("binary", "string", "large_binary", "large_string"))

    def arrays(self, column: str) -> np.ndarray:
        """``[N, ...]`` of a column of nested lists of numbers, all of one shape. Raises: UserError naming it."""
        parts = [_array(part) for part in self._parts(column) if len(part)]
        if not parts or any(part is None for part in parts) or len({part.shape[1:] for part in parts}) != 1:
            got = f"{self.schema.field(column).type} in {printable(self.path)}"
            fail("data", f"column {column}", "hold encoded images, or arrays of one shape", got)
        return np.concatenate(parts)

    def column(self, group: int, name: str) -> Any:
        """The values of one row group of parquet, or of one batch of arrow.

        Of parquet the last groups are kept, as images are read in their order, by several threads.
        """
        import pyarrow

        with self._lock:
            if not self._is_parquet:
                values = self._batches[group].column(self.schema.get_field_index(name))
            elif (values := self._recent.get((group, name))) is None:
                values = combined(self._parquet.read_row_group(group, columns=[name]).column(name))
                while len(self._recent) >= KEPT:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[group, name] = values
            return values.storage if isinstance(values, pyarrow.ExtensionArray) else values

    def _parts(self, column: str) -> list[Any]:
        try:
            groups = [self.column(group, column) for group in range(len(self._rows))]
            return [part for each in groups for part in getattr(each, "chunks", [each])]
        except ERRORS as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        kind, why = "parquet" if self._is_parquet else "arrow", other_format_of(self.path) or first_line(error)
        return UserError(f"data: source must hold readable {kind} files, got {printable(self.path)} ({why})")


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The bytes of one image, read when it is called."""

    file: ArrowFile
    group: int
    column: str
    row: int

    def __call__(self) -> bytes:
        value = self.file.column(self.group, self.column)[self.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict):
            content = value.get("path")
        if isinstance(content, str):
            return (self.file.path.parent / content).read_bytes()
        if content is None:
            raise ValueError("the row holds no image")
        return content


def _stream(path: Path) -> tuple[list[Any], Any]:
    """(batches, schema) of an arrow stream; its pages are mapped into memory, and read as they are used."""
    import pyarrow

    with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as reader:
        batches = list(reader)
    for batch in batches:
        batch.validate(full=True)  # of a damaged file, offsets may lead outside of it
    return batches, reader.schema


def combined(values: Any) -> Any:
    """A column as one array; as it is where offsets of 32 bits do not hold it, as of more than 2 GiB of images."""
    import pyarrow

    try:
        return values.combine_chunks()
    except pyarrow.ArrowInvalid:
        return values


def _array(values: Any) -> np.ndarray | None:
    """``[N, ...]`` of nested lists without gaps; None where their lengths differ or they hold no numbers."""
    import pyarrow

    kinds, shape = pyarrow.types, [len(values)]
    while kinds.is_list(values.type) or kinds.is_large_list(values.type) or kinds.is_fixed_size_list(values.type):
        if values.null_count or not len(values):
            return None
        lengths = (
            set(values.value_lengths().to_pylist())
            if not kinds.is_fixed_size_list(values.type)
            else {values.type.list_size}
        )
        if len(lengths) > 1:
            return None
        shape.append(lengths.pop())
        values = values.flatten()
    if values.null_count or not (kinds.is_integer(values.type) or kinds.is_floating(values.type)):
        return None
    return values.to_numpy(zero_copy_only=False).reshape(shape)
