"""Where images go: one small class a format. A shard's bytes are a function of its ids, labels and images only.

A sink names the files of a shard and makes a writer of them; a writer is given batches in the order of their ids, on
the CPU. Files are written from start to end, so that they are hashed on the way.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kr_fast.ops.sampling.encode_png import encode_png, png_size
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage.files import named


class Output:
    """One file of a shard, write-only, with the SHA-256 of what has been written."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("wb")
        self._hash, self.size, self._given_up = hashlib.sha256(), 0, False

    @property
    def closed(self) -> bool:
        """As libraries ask of a file."""
        return self._file.closed

    def write(self, data: Any) -> int:
        """All of ``data``, any contiguous buffer."""
        view = memoryview(data).cast("B")
        if self._given_up:
            return len(view)
        with named(self._path):
            self._file.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._given_up:
            return
        with named(self._path):
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with named(self._path):
            self._file.close()

    def give_up(self) -> None:
        """Close a file that nobody will read: a writer of a library that is freed later still writes its index."""
        self._given_up = True
        with contextlib.suppress(OSError):
            self._file.close()

    def sha256(self) -> str:
        """Hexadecimal."""
        return self._hash.hexdigest()


@dataclasses.dataclass(frozen=True)
class Column:
    """What else a set says of each image: ``size`` float32 numbers, or with ``size`` 0 a class, int64."""

    name: str
    size: int = 0


class ShardWriter(Protocol):
    """What a sink makes of the open files of one shard."""

    def write(self, ids: Tensor, labels: Tensor, images: Tensor, *further: Tensor) -> None:
        """The next images: int64 ``[B]``, int64 ``[B]``, contiguous uint8 ``[B, H, W, C]``, on the CPU.

        ``further``: a tensor ``[B, size]`` or ``[B]`` for each :class:`Column` that the sink was made with.
        """

    def close(self) -> None:
        """Write what belongs at the end; the files are closed by the caller."""


class Sink(Protocol):
    """A format. ``suffixes``: of the files of a shard."""

    suffixes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """What besides ids, labels and images decides the bytes, as plain values."""

    def writer(self, outputs: Sequence[Output], count: int, shape: tuple[int, int, int], classes: int) -> ShardWriter:
        """A writer of ``count`` images of ``shape`` (height, width, channels) and of labels below ``classes``."""


def make_sink(format: str) -> Sink:
    """The sink of a format's name."""
    if format not in FORMATS:
        fail("synthesize", "format", f"be one of {', '.join(FORMATS)}, device", format)
    return FORMATS[format]()


class _Columns:
    """Labels and ids, which are small, until the shard is closed."""

    def __init__(self):
        self._ids: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, ids: Tensor, labels: Tensor) -> None:
        self._ids.append(ids)
        self._labels.append(labels)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(labels, ids), int64."""
        return torch.cat(self._labels).numpy(), torch.cat(self._ids).numpy()


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class NpySink:
    """``images.npy`` uint8 NHWC, ``labels.npy`` and ``ids.npy`` int64: for ``numpy.load(..., mmap_mode="r")``."""

    suffixes = (".images.npy", ".labels.npy", ".ids.npy")

    def describe(self) -> dict[str, Any]:
        return {}

    def writer(self, outputs, count, shape, classes) -> "_NpyWriter":
        return _NpyWriter(outputs, count, shape)


class _NpyWriter:
    def __init__(self, outputs, count, shape):
        self._images, *self._rest = outputs
        self._columns = _Columns()
        self._images.write(_header("|u1", (count, *shape)))

    def write(self, ids, labels, images):
        self._columns.add(ids, labels)
        self._images.write(images.numpy())

    def close(self):
        for output, values in zip(self._rest, self._columns.arrays(), strict=True):
            output.write(_header("<i8", values.shape))
            output.write(values.astype("<i8", copy=False))


class NpzSink:
    """One ``.npz``, not compressed: ``arr_0`` images and ``arr_1`` labels, as ADM's evaluation expects, and ``ids``."""

    suffixes = (".npz",)

    def describe(self) -> dict[str, Any]:
        return {}

    def writer(self, outputs, count, shape, classes) -> "_NpzWriter":
        return _NpzWriter(outputs[0], count, shape)


class _NpzWriter:
    def __init__(self, output, count, shape):
        self._columns = _Columns()
        self._zip = zipfile.ZipFile(output, "w", zipfile.ZIP_STORED)
        self._images = self._member("arr_0", count * shape[0] * shape[1] * shape[2])
        self._images.write(_header("|u1", (count, *shape)))

    def _member(self, name, size):
        info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the bytes do not depend on the clock
        return self._zip.open(info, "w", force_zip64=size > 2**31 - 2**16)

    def write(self, ids, labels, images):
        self._columns.add(ids, labels)
        self._images.write(images.numpy())

    def close(self):
        self._images.close()
        for name, values in zip(("arr_1", "ids"), self._columns.arrays(), strict=True):
            with self._member(name, values.nbytes) as member:
                member.write(_header("<i8", values.shape) + values.astype("<i8", copy=False).tobytes())
        self._zip.close()


# Encoded in pieces that the allocator keeps: larger ones are mapped anew each time, a page fault for every 4 KB.
_PIECE = 1 << 17
OFFSETS = 2**31 - 1  # the largest that a column of binary values has in a row group


def _pieces(ids: Tensor, labels: Tensor, images: Tensor, *further: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
    """(ids, PNG files ``[n, size]``, labels, further columns) of a few images at a time."""
    step = max(1, _PIECE // png_size(*images.shape[1:]))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        rest = (each[part].numpy() for each in (labels, *further))
        yield ids[part].numpy(), encode_png(images[part]).numpy(), *rest


def _digits(values: np.ndarray, base: int, width: int) -> np.ndarray:
    """``values`` as ``width`` digits with leading zeros, uint8 ``[N, width]``, without the offset of ASCII."""
    return (values[:, None] // base ** np.arange(width - 1, -1, -1) % base).astype(np.uint8)


class TarSink:
    """WebDataset: a tar of ``<id>.png`` (stored, RGB or grey) and ``<id>.cls``, the id in 12 digits.

    A further column is ``<id>.<name>.npy``, or ``<id>.<name>.cls`` for a class. The same bytes as Python's ``tarfile``
    writes in ustar format with time, owner and group 0 and mode 644.
    """

    suffixes = (".tar",)
    DIGITS = 12

    def __init__(self, columns: Sequence[Column] = ()):
        self._columns = columns

    def describe(self) -> dict[str, Any]:
        return {"key_digits": self.DIGITS}

    def writer(self, outputs, count, shape, classes) -> "_TarWriter":
        return _TarWriter(outputs[0], shape, classes, self._columns)


class _TarWriter:
    """All members of an image in one row: header, PNG, header, class. Only digits and checksums differ by row."""

    def __init__(self, output, shape, classes, columns):
        self._output, self._digits = output, len(str(max(classes - 1, 0)))
        self._before = [None, None, *(_header("<f4", (each.size,)) if each.size else None for each in columns)]
        sizes = {"png": png_size(*shape), "cls": self._digits}
        for column, before in zip(columns, self._before[2:], strict=True):
            if before is None:
                sizes[f"{column.name}.cls"] = self._digits
            else:
                sizes[f"{column.name}.npy"] = len(before) + 4 * column.size
        row, self._members = b"", []  # of each member: where its header is, the sum of its bytes, its size
        for suffix, size in sizes.items():
            header = self._header(suffix, size)
            self._members.append((len(row), sum(header), size))
            row += header + bytes(-(-size // 512) * 512)
        self._rows = np.repeat(np.frombuffer(row, np.uint8)[None], max(1, _PIECE // sizes["png"]), axis=0)

    def _header(self, suffix, size):
        info = tarfile.TarInfo(f"{'0' * TarSink.DIGITS}.{suffix}")
        info.size = size
        header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        header[148:156] = b" " * 8  # the checksum counts its own field as blanks
        return bytes(header)

    def write(self, ids, labels, images, *further):
        for part_ids, files, *columns in _pieces(ids, labels, images, *further):
            rows, key = self._rows[: len(files)], _digits(part_ids, 10, TarSink.DIGITS)
            for (at, base, size), before, values in zip(self._members, self._before, [files, *columns], strict=True):
                rows[:, at : at + TarSink.DIGITS] = key + ord("0")
                checksum = base + key.sum(axis=1, dtype=np.int64)
                rows[:, at + 148 : at + 154] = _digits(checksum, 8, 6) + ord("0")
                rows[:, at + 154] = 0
                rows[:, at + 512 : at + 512 + size] = self._content(before, values)
            self._output.write(rows)

    def _content(self, before, values):
        """The bytes of a member, uint8 ``[n, size]``."""
        if before is not None:
            head = np.broadcast_to(np.frombuffer(before, np.uint8), (len(values), len(before)))
            return np.concatenate([head, np.ascontiguousarray(values, "<f4").view(np.uint8)], axis=1)
        return _digits(values, 10, self._digits) + ord("0") if values.ndim == 1 else values

    def close(self):
        end = self._output.size + 1024  # two empty blocks, then whole records of 20
        self._output.write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self._output.size))


class ParquetSink:
    """Parquet that ``datasets.load_dataset`` reads: ``image`` (an ``Image`` feature, stored PNG), ``label``, ``id``."""

    suffixes = (".parquet",)

    def __init__(
        self, class_names: Sequence[str] | None = None, columns: Sequence[Column] = (), where: str = "synthesize"
    ):
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(
                f"{where}: format parquet must have pyarrow installed, got none; pip install 'kr-fast[parquet]'"
            ) from error
        self._version = pyarrow.__version__
        self._names, self._columns = class_names, columns

    def describe(self) -> dict[str, Any]:
        return {"pyarrow": self._version}  # it writes its version into each file

    def writer(self, outputs, count, shape, classes) -> "_ParquetWriter":
        names = [str(c) for c in range(classes)] if self._names is None else list(self._names)
        return _ParquetWriter(outputs[0], names, self._columns)


class _ParquetWriter:
    def __init__(self, output, names, columns):
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._columns = pyarrow, columns
        label, number = {"names": names, "_type": "ClassLabel"}, {"dtype": "float32", "_type": "Value"}
        features = {"image": {"_type": "Image"}, "label": label, "id": {"dtype": "int64", "_type": "Value"}}
        self._image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        fields = [("image", self._image), ("label", pyarrow.int64()), ("id", pyarrow.int64())]
        for column in columns:
            several = {"feature": number, "length": column.size, "_type": "Sequence"}
            features[column.name] = several if column.size else label
            kind = pyarrow.list_(pyarrow.float32(), column.size) if column.size else pyarrow.int64()
            fields.append((column.name, kind))
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self._schema = pyarrow.schema(fields, metadata=metadata)
        # A batch is a row group, or several where offsets would not hold it. Pixels are stored, as in the PNG; ids and
        # labels hold nothing worth a dictionary.
        self._parquet = pyarrow.parquet.ParquetWriter(
            output, self._schema, compression="NONE", use_dictionary=False, write_statistics=["label", "id"]
        )

    def write(self, ids, labels, images, *further):
        most = max(1, OFFSETS // png_size(*images.shape[1:]))
        for part in zip(*(each.split(most) for each in (ids, labels, images, *further)), strict=True):
            self._write_group(*part)

    def _write_group(self, ids, labels, images, *further):
        arrow = self._arrow
        files = encode_png(images).numpy()
        offsets = np.arange(len(files) + 1, dtype=np.int32) * files.shape[1]
        png = arrow.Array.from_buffers(
            arrow.binary(), len(files), [None, arrow.py_buffer(offsets), arrow.py_buffer(files)]
        )
        image = arrow.StructArray.from_arrays([png, arrow.nulls(len(files), arrow.string())], fields=list(self._image))
        arrays = [image, arrow.array(labels.numpy()), arrow.array(ids.numpy())]
        for column, values in zip(self._columns, further, strict=True):
            flat = arrow.array(values.numpy().reshape(-1))
            arrays.append(arrow.FixedSizeListArray.from_arrays(flat, column.size) if column.size else flat)
        self._parquet.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self):
        self._parquet.close()


FORMATS: dict[str, type] = {"npy": NpySink, "npz": NpzSink, "webdataset": TarSink, "parquet": ParquetSink}
