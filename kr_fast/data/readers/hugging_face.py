"""Data sets of the package ``datasets``: a folder of parquet files, one such file, or what ``save_to_disk`` writes.

The package itself is not needed, and nothing of a data set is run.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.data.options import COLUMNS, ReadOptions
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.readers import columns, kinds
from kr_fast.data.readers.arrow_files import ArrowFile
from kr_fast.data.readers.decoding import decoded, from_arrays
from kr_fast.data.splits import SourceContent, split_name
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

STATE, DICT = "state.json", "dataset_dict.json"


def saved_to_disk(path: Path) -> bool:
    """Whether the folder ``path`` was written by ``save_to_disk``."""
    return (path / DICT).is_file() or (path / STATE).is_file()


def read(path: Path, shards: list[Path], options: ReadOptions, sizes: tuple[int, int] | None) -> SourceContent:
    """The images of a data set.

    Args:
        path: a folder that was saved to disk, or whatever holds the parquet files ``shards``.
    Raises: UserError naming the file or column.
    """
    by_split = _saved(path) if not shards else kinds.by_split(path, shards)
    opened = {which: [ArrowFile(file) for file in each] for which, each in by_split.items()}
    first = next(iter(opened.values()))[0]
    features = first.features()
    for file in (file for each in opened.values() for file in each):
        if file.names != first.names or file.features() != features:
            got = f"{printable(file.path.name)} with others than {printable(first.path.name)}"
            fail("data", "source", "have the same columns and classes in every file", got)
    named = _columns(first, features, options, by_split.keys() == {"all"})
    values = {
        name: {which: [value for file in each for value in file.values(column)] for which, each in opened.items()}
        for name, column in named.items()
        if name != "image_column"
    }
    image = named["image_column"]
    if first.holds_encoded(image):
        pixels: dict[str, Any] = {which: [i for f in each for i in f.images(image)] for which, each in opened.items()}
    else:
        pixels = {which: np.concatenate([file.arrays(image) for file in each]) for which, each in opened.items()}
    if "split_column" in named:
        pixels, values = _split_again(pixels["all"], values, f"split_column {named['split_column']}")
    if unread := [column for column in first.names if column not in named.values()]:
        logger.info("data: columns not read: %s", listed("", unread, 8))
    names, labels = _classes(values["label_column"], features.get(named["label_column"], {}), named["label_column"])
    groups = None
    if "group_column" in values:
        groups = columns.groups(values["group_column"], f"group_column {named['group_column']}")
    if first.holds_encoded(image):
        parts, notes, warnings = decoded(pixels, labels, groups, sizes, options)
        return SourceContent(parts, names, notes, warnings)
    parts, notes, warnings = from_arrays(pixels, labels, groups, f"column {image}")
    return SourceContent(parts, names, notes, warnings)


def _saved(path: Path) -> dict[str, list[Path]]:
    """split -> arrow files, as the JSON files of ``save_to_disk`` name them; ``all`` of a set without splits."""
    if not (path / DICT).is_file():
        return {"all": _data_files(path)}
    names = [str(name) for name in _entry(path / DICT, "splits")]
    known = [split_name(name) for name in names]
    if None in known or len(set(known)) < len(known):
        fail("data", "source", "name its splits train, validation and test, each once", listed("", names, 6))
    return kinds.in_order({which: _data_files(path / name) for which, name in zip(known, names, strict=True)}, path)


def _data_files(path: Path) -> list[Path]:
    result = [path / Path(str(each.get("filename"))).name for each in _entry(path / STATE, "_data_files")]
    if absent := [file.name for file in result if not file.is_file()]:
        fail("data", "source", f"hold the files that {STATE} names", f"{printable(path)} without {listed('', absent)}")
    if not result:
        fail("data", "source", "hold at least one image", f"none in {printable(path)}")
    return result


def _entry(path: Path, key: str) -> list[Any]:
    try:
        entry = files.read_json(path, dict)[key]
        if not isinstance(entry, list) or (key == "_data_files" and not all(isinstance(e, dict) for e in entry)):
            raise ValueError(f"{key} is no list of files")
        return entry
    except (UserError, OSError, KeyError, ValueError, json.JSONDecodeError) as error:
        got = f"{printable(path)} ({first_line(error)})"
        raise UserError(f"data: source must hold readable JSON of save_to_disk, got {got}") from error


def _columns(file: ArrowFile, features: dict, options: ReadOptions, uncut: bool) -> dict[str, str]:
    """Option -> column: what is asked for, else the one with such a feature, else one of a usual name."""
    result = {}
    for option in COLUMNS:
        kind = {"image_column": "Image", "label_column": "ClassLabel"}.get(option)
        given = getattr(options, option)
        fitting = [name for name, each in features.items() if each.get("_type") == kind]
        if option == "split_column" and not uncut:
            options.refuse((option,), "a source whose files are splits")
            continue
        if not given and len(fitting) == 1:
            given = fitting[0]
        if column := columns.column(file.names, option, given, file.path.name):
            result[option] = column
            if file.names.count(column) > 1:
                fail("data", option, "be a column that is there once", f"{column} in {printable(file.path)}")
    return result


def _classes(values: dict[str, list[Any]], feature: dict, column: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    what, names = f"label_column {column}", feature.get("names")
    if feature.get("_type") != "ClassLabel" or not isinstance(names, list):
        return columns.classes(values, what)
    every = [value for each in values.values() for value in each]
    if missing := sum(value is None or value == -1 for value in every):
        fail("data", what, "hold a class in every row", f"nothing in {counted(missing, 'row')}")
    if bad := [value for value in every if not isinstance(value, int) or not 0 <= value < len(names)]:
        fail("data", what, f"hold integers in [0, {len(names)}), its classes", bad[0])
    for name in names:
        if not str(name).isprintable():
            fail("data", what, "hold names that can be printed", printable(name))
    return tuple(map(str, names)), {which: np.array(each, np.int64) for which, each in values.items()}


def _split_again(pixels: Any, values: dict[str, dict[str, list[Any]]], what: str) -> tuple[dict, dict]:
    """Images and values by a column of splits."""
    which = columns.split_names(values["split_column"]["all"], what)
    rows = {name: each["all"] for name, each in values.items()}
    parts = columns.by_split({**rows, "at": list(range(len(which)))}, which)
    at = parts.pop("at")
    if isinstance(pixels, np.ndarray):
        return {name: pixels[each] for name, each in at.items()}, parts
    return {name: [pixels[row] for row in each] for name, each in at.items()}, parts
