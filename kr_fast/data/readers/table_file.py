"""Columns of a csv, tsv, parquet or JSON-lines file."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

from kr_fast.data.printable import listed, printable
from kr_fast.runtime.array_files import DAMAGE, regular_file
from kr_fast.runtime.errors import UserError, fail, first_line

SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".parquet")
MOST_BYTES = 1 << 30  # of a csv file, which is read whole


def read_table(path: Path) -> dict[str, list[Any]]:
    """Column -> its values, of one length; text of csv and tsv, in UTF-8, whose first line names the columns.

    Each line of a ``.jsonl`` file is an object with the same keys.

    Raises: UserError naming the file, and the line that is not as the first; FileNotFoundError.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        fail("data", "table", f"be a {', '.join(SUFFIXES)} file", printable(path))
    if not path.exists():
        raise FileNotFoundError(f"data: table must be a {suffix} file, got {printable(path)}, which is not there")
    regular_file(path, "data: table")
    return _parquet(path) if suffix == ".parquet" else _delimited(path, suffix)


def import_parquet(what: str) -> Any:
    """``pyarrow.parquet``. Raises: UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        rule = f"data: {what} must have pyarrow installed, got none; pip install 'kr-fast[parquet]'"
        raise UserError(rule) from error
    return pyarrow.parquet


def _parquet(path: Path) -> dict[str, list[Any]]:
    reader = import_parquet("table")
    try:
        with reader.ParquetFile(path) as file:
            flat = [field.name for field in file.schema_arrow if not str(field.type).startswith(("struct", "binary"))]
            if len(set(flat)) == len(flat):
                table = file.read(columns=flat)
                return {name: table.column(name).to_pylist() for name in flat}
    except DAMAGE as error:
        raise UserError(
            f"data: table must be a readable parquet file, got {printable(path)} ({first_line(error)})"
        ) from error
    fail("data", "table", "name each column once", f"{listed('', flat, 12)} in {printable(path)}")


def _delimited(path: Path, suffix: str) -> dict[str, list[str]]:
    if (size := path.stat().st_size) > MOST_BYTES:
        fail(
            "data", "table", f"be at most {MOST_BYTES >> 30} GiB (of parquet, columns alone are read)", f"{size} bytes"
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"
        got = f"{printable(path)} (iconv -f {encoding} -t UTF-8 or a spreadsheet's export as UTF-8 makes one)"
        raise UserError(f"data: table must be text in UTF-8, got {got}") from error
    if "\0" in text[:4096]:
        fail("data", "table", "be text in UTF-8", f"{printable(path)}, which is binary")
    if suffix == ".jsonl":
        return _json_lines(path, text)
    header = text.split("\n", 1)[0]
    delimiter = "\t" if suffix != ".csv" else max(",;\t", key=header.count)  # a comma where there is none
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        if len(set(names)) < len(names) or not any(names):
            got = f"{listed('', names, 12) or 'an empty line'} in {printable(path)}"
            fail("data", "table", "name each column once, in its first line", got)
        columns: list[list[str]] = [[] for _ in names]
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                got = f"{len(row)} in line {rows.line_num} of {printable(path)}"
                fail("data", "table", f"have {len(names)} values in every line, as its first has", got)
            for values, value in zip(columns, row, strict=True):
                values.append(value)
    except csv.Error as error:
        got = f"{printable(path)}, line {rows.line_num} ({error})"
        raise UserError(f"data: table must be a readable {suffix} file, got {got}") from error
    return dict(zip(names, columns, strict=True))


def _json_lines(path: Path, text: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {printable(path)}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data: table must hold JSON in each line, got {where} ({first_line(error)})") from error
        if not isinstance(row, dict) or (columns and row.keys() != columns.keys()):
            keys = f"the keys {listed('', list(columns), 12)}" if columns else "an object"
            fail("data", "table", f"hold {keys} in each line", where)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns
