"""Where images go: one small class a format. A shard's bytes are a function of its ids, labels and images only.

A sink names the files of a shard and makes a writer of them; a writer is given batches in the order of their ids, on
the CPU. Files are written from start to end, so that they are hashed on the way.
"""

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
        self._hash, self.size, self.closed = hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        """All of ``data``, any contiguous buffer."""
        view = memoryview(data).cast("B")
        with named(self._path):
            self._file.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        with named(self._path):
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with named(self._path):
            self._file.close()
        self.closed = True

    def sha256(self) -> str:
        """Hexadecimal."""
        return self._hash.hexdigest()


class ShardWriter(Protocol):
    """What a sink makes of the open files of one shard."""

    def write(self, ids: Tensor, labels: Tensor, images: Tensor) -> None:
        """The next images: int64 ``[B]``, int64 ``[B]``, contiguous uint8 ``[B, H, W, C]``, on the CPU."""

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


def _pieces(ids: Tensor, labels: Tensor, images: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, labels, PNG files ``[n, size]``) of a few images at a time."""
    step = max(1, _PIECE // png_size(*images.shape[1:]))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        yield ids[part].numpy(), labels[part].numpy(), encode_png(images[part]).numpy()


def _digits(values: np.ndarray, base: int, width: int) -> np.ndarray:
    """``values`` as ``width`` digits with leading zeros, uint8 ``[N, width]``, without the offset of ASCII."""
    return (values[:, None] // base ** np.arange(width - 1, -1, -1) % base).astype(np.uint8)


class TarSink:
    """WebDataset: a tar of ``<id>.png`` (stored, RGB or grey) and ``<id>.cls``, the id in 12 digits.

    The same bytes as Python's ``tarfile`` writes in ustar format with time, owner and group 0 and mode 644.
    """

    suffixes = (".tar",)
    DIGITS = 12

    def describe(self) -> dict[str, Any]:
        return {"key_digits": self.DIGITS}

    def writer(self, outputs, count, shape, classes) -> "_TarWriter":
        return _TarWriter(outputs[0], shape, classes)


class _TarWriter:
    """All members of an image in one row: header, PNG, header, class. Only digits and checksums differ by row."""

    def __init__(self, output, shape, classes):
        self._output, self._width = output, len(str(max(classes - 1, 0)))
        self._size = png_size(*shape)
        padded = -(-self._size // 512) * 512
        png, cls = self._header("png", self._size), self._header("cls", self._width)
        row = np.frombuffer(png + bytes(padded) + cls + bytes(512), np.uint8)
        self._rows = np.repeat(row[None], max(1, _PIECE // self._size), axis=0)
        self._headers = [(at, int(self._rows[0, at : at + 512].sum())) for at in (0, 512 + padded)]
        self._cls = 1024 + padded

    def _header(self, suffix, size):
        info = tarfile.TarInfo(f"{'0' * TarSink.DIGITS}.{suffix}")
        info.size = size
        header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        header[148:156] = b" " * 8  # the checksum counts its own field as blanks
        return bytes(header)

    def write(self, ids, labels, images):
        for part_ids, part_labels, files in _pieces(ids, labels, images):
            rows, key = self._rows[: len(files)], _digits(part_ids, 10, TarSink.DIGITS)
            for at, base in self._headers:
                rows[:, at : at + TarSink.DIGITS] = key + ord("0")
                checksum = base + key.sum(axis=1, dtype=np.int64)
                rows[:, at + 148 : at + 154] = _digits(checksum, 8, 6) + ord("0")
                rows[:, at + 154] = 0
            rows[:, 512 : 512 + self._size] = files
            rows[:, self._cls : self._cls + self._width] = _digits(part_labels, 10, self._width) + ord("0")
            self._output.write(rows)

    def close(self):
        end = self._output.size + 1024  # two empty blocks, then whole records of 20
        self._output.write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self._output.size))


class ParquetSink:
    """Parquet that ``datasets.load_dataset`` reads: ``image`` (an ``Image`` feature, stored PNG), ``label``, ``id``."""

    suffixes = (".parquet",)

    def __init__(self):
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(
                "synthesize: format parquet must have pyarrow installed, got none; pip install 'kr-fast[parquet]'"
            ) from error
        self._version = pyarrow.__version__

    def describe(self) -> dict[str, Any]:
        return {"pyarrow": self._version}  # it writes its version into each file

    def writer(self, outputs, count, shape, classes) -> "_ParquetWriter":
        return _ParquetWriter(outputs[0], classes)


class _ParquetWriter:
    def __init__(self, output, classes):
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        features = {
            "image": {"_type": "Image"},
            "label": {"names": [str(c) for c in range(classes)], "_type": "ClassLabel"},
            "id": {"dtype": "int64", "_type": "Value"},
        }
        self._image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        self._schema = pyarrow.schema(
            [("image", self._image), ("label", pyarrow.int64()), ("id", pyarrow.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        # A batch is a row group. Pixels are stored, as in the PNG; ids and labels hold nothing worth a dictionary.
        self._parquet = pyarrow.parquet.ParquetWriter(
            output, self._schema, compression="NONE", use_dictionary=False, write_statistics=["label", "id"]
        )

    def write(self, ids, labels, images):
        arrow = self._arrow
        files = encode_png(images).numpy()
        offsets = np.arange(len(files) + 1, dtype=np.int32) * files.shape[1]
        png = arrow.Array.from_buffers(
            arrow.binary(), len(files), [None, arrow.py_buffer(offsets), arrow.py_buffer(files)]
        )
        image = arrow.StructArray.from_arrays([png, arrow.nulls(len(files), arrow.string())], fields=list(self._image))
        table = arrow.Table.from_arrays(
            [image, arrow.array(labels.numpy()), arrow.array(ids.numpy())], schema=self._schema
        )
        self._parquet.write_table(table)

    def close(self):
        self._parquet.close()


FORMATS: dict[str, type] = {"npy": NpySink, "npz": NpzSink, "webdataset": TarSink, "parquet": ParquetSink}
