"""A folder of images with a table of their classes: ``image,label[,split][,group]``.

Such tables, called ``metadata``, are in the folders that Hugging Face's ImageFolder reads: one, or one in each split.
"""

import dataclasses
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from kr_fast.data import folders
from kr_fast.data.options import ReadOptions
from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.readers import columns
from kr_fast.data.readers.decoding import decoded
from kr_fast.data.readers.table_file import read_table
from kr_fast.data.splits import SourceContent, split_name
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger

METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
FILE_NAME, SPLIT = "file_name", "split"  # the column of files in them; that of the folders they lie in


def read(root: Path, options: ReadOptions, sizes: tuple[int, int] | None) -> SourceContent:
    """The images below ``root`` that the table ``options.table`` names, in the order of its rows.

    Raises: UserError naming the table, its rule and the rows or files that break it; FileNotFoundError.
    """
    path = Path(options.table)
    return _read(root, read_table(path), [path], options, sizes)


def metadata(root: Path) -> dict[str, Path]:
    """split -> the ``metadata`` file of it, ``all`` for one of the whole folder; nothing where there is none."""
    places = {"all": root, **{which: each for each in _folders(root) if (which := split_name(each.name))}}
    found = {which: place / name for which, place in places.items() for name in METADATA if (place / name).is_file()}
    return {"all": found["all"]} if "all" in found else found if "train" in found else {}


def read_metadata(
    root: Path, tables: dict[str, Path], options: ReadOptions, sizes: tuple[int, int] | None
) -> SourceContent | None:
    """As :func:`read`, by the files of :func:`metadata`; None where they name no classes, as the folders then do."""
    rows: dict[str, list[Any]] = {}
    for which, path in tables.items():
        table = read_table(path)
        label = options.label_column or next(
            (name for name in table if name.lower() in columns.USUAL["label_column"]), ""
        )
        if FILE_NAME not in table or label not in table:
            return None
        if rows and table.keys() != rows.keys() - {SPLIT}:
            got = f"{listed('', list(table), 12)} in {printable(path)}"
            fail("data", "metadata of each split", "have the columns of the first", got)
        if which != "all":
            table[FILE_NAME] = [os.path.join(path.parent.name, str(name)) for name in table[FILE_NAME]]
            table[SPLIT] = [which] * len(table[FILE_NAME])
        for name, values in table.items():
            rows.setdefault(name, []).extend(values)
    given = {"image_column": options.image_column or FILE_NAME}
    if "all" not in tables:
        given["split_column"] = SPLIT
    return _read(root, rows, list(tables.values()), dataclasses.replace(options, **given), sizes)


def _folders(root: Path) -> list[Path]:
    return sorted(each for each in root.iterdir() if each.is_dir())


def _read(
    root: Path, table: dict[str, list[Any]], paths: list[Path], options: ReadOptions, sizes: tuple[int, int] | None
) -> SourceContent:
    path = paths[0]
    if not (table and next(iter(table.values()))):
        fail("data", "table", "hold at least one row", f"none in {printable(path)}")
    named = {name: columns.column(list(table), name, getattr(options, name), path.name) for name in columns.USUAL}
    used = {name: column for name, column in named.items() if column}
    what = {name: f"{name} {column} of {printable(path.name)}" for name, column in used.items()}
    if twice := [column for column, count in Counter(used.values()).items() if count > 1]:
        fail("data", "table", "have a column of its own for each of image, label, split and group", twice[0])
    tree = folders.scan(root, {})
    files, notes = _files(tree, table[used["image_column"]], path, options.skip_unreadable)
    rows: dict[str, list[Any]] = {name: table[column] for name, column in used.items()}
    rows["image_column"] = files
    kept = [at for at, file in enumerate(files) if file is not None]
    rows = {name: [values[at] for at in kept] for name, values in rows.items()}
    if len(paths) == 1:
        for name in (each for each in columns.FILLED if each in rows):
            columns.refuse_missing(rows[name], what[name], columns.FILLED[name], [at + 1 for at in kept])
    which = columns.split_names(rows["split_column"], what["split_column"]) if "split_column" in rows else None
    parts = columns.by_split(rows, which)
    names, labels = columns.classes(parts["label_column"], what["label_column"])
    groups = columns.groups(parts["group_column"], what["group_column"]) if "group_column" in parts else None
    read_parts, done, warnings = decoded(parts["image_column"], labels, groups, sizes, options)
    if unread := [column for column in table if column not in used.values()]:
        logger.info("data: columns not read: %s", listed("", unread, 8))
    unread_files = tree.all_unread()
    for each in paths:
        unread_files[folders.unread_key(each.suffix.lower())] -= each.resolve().is_relative_to(root.resolve())
    return SourceContent(read_parts, names, [*done, *notes, *folders.unread_note(unread_files)], warnings)


def _files(tree: folders.Folder, values: list[Any], table: Path, skip: bool) -> tuple[list[Path | None], list[str]]:
    """(the file of each row, None where it is left out; notes).

    A row names a file by its path below the folder or beside the table, by its name alone where no other file has it,
    with or without its suffix.
    """
    images = tree.all_images()
    paths, names = _keys(images, tree.path)
    exact = {os.path.normpath(file): file for file in images}
    result: list[Path | None] = []
    absent, several, again, seen = [], [], [], set()
    for value in values:
        text = "" if value is None else str(value)
        near = (os.path.normpath(os.path.join(folder, text)) for folder in (tree.path, table.parent))
        there = next((exact[path] for path in near if path in exact), None) if text else None
        candidates = _candidates(text, paths, names) if there is None else [there]
        if len(candidates) > 1:
            several.append(f"{text} ({listed('', [file.relative_to(tree.path) for file in candidates], 2)})")
        elif not candidates:
            absent.append(text or "nothing")
        elif candidates[0] in seen:
            again.append(text)
        seen.update(candidates)
        result.append(candidates[0] if len(candidates) == 1 else None)
    if several:
        fail("data", "table", "name each image by a path that only one has", listed("", several))
    if again:
        fail("data", "table", "name each image once (one label an image)", listed("row", again) + " again")
    extra = [file.relative_to(tree.path) for file in images if file not in seen]
    remedy = "; --skip-unreadable leaves them out and counts them"
    if len(absent) == len(values):
        such = f" such as {printable(images[0].name)}" if images else tree.suffixes()
        got = f"{listed('', absent)} where {printable(tree.path)} holds {counted(len(images), 'image')}{such}"
        fail("data", "table", "name images of the folder", got)
    if absent and not skip:
        got = f"{counted(len(absent), 'row')} of {len(values)} without: {listed('', absent)}{remedy}"
        fail("data", "table", f"have an image in {printable(tree.path)} for each row", got)
    if extra and not skip:
        got = f"{counted(len(extra), 'image')} of {len(images)} without: {listed('', extra)}{remedy}"
        fail("data", "table", "have a row for each image of the folder", got)
    notes = [f"left out: {counted(len(absent), 'row')} without an image"] if absent else []
    notes += [f"left out: {counted(len(extra), 'image')} without a row"] if extra else []
    return result, notes


def _keys(images: list[Path], root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """(path below ``root`` -> files, name -> files), each with and without suffix."""
    paths: dict[str, list[Path]] = {}
    names: dict[str, list[Path]] = {}
    for file in images:
        below = _normal(os.path.relpath(file, root))
        for keys, whole in ((paths, below), (names, os.path.basename(below))):
            for key in (whole, os.path.splitext(whole)[0]):
                keys.setdefault(key, []).append(file)
    return paths, names


def _candidates(text: str, paths: dict[str, list[Path]], names: dict[str, list[Path]]) -> list[Path]:
    """The files that ``text`` may stand for: a path whose end is that of a file below the folder, or a bare name."""
    for written in (text, text.strip(), text.strip().replace("\\", "/")):
        parts = [part for part in _normal(written).split("/") if part not in ("", ".")]
        for first in range(len(parts)):
            if there := paths.get("/".join(parts[first:])):
                return there
        if len(parts) == 1 and (there := names.get(parts[0])):
            return there
    return []


def _normal(text: str) -> str:
    """One form of letters with accents, which macOS writes as two characters."""
    return unicodedata.normalize("NFC", text)
