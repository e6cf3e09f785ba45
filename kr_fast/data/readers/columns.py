"""Columns of labels, groups and splits as people write them -> numbers."""

import math
import re
from collections import Counter
from typing import Any

import numpy as np

from kr_fast.data.printable import counted, listed, printable
from kr_fast.data.splits import CLASSES, split_name
from kr_fast.runtime.errors import fail

USUAL = {
    "image_column": ("image", "img", "file_name", "filename", "file", "path", "image_path", "image_id"),
    "label_column": ("label", "labels", "class", "target"),
    "split_column": ("split",),
    "group_column": (),
}
FILLED = {
    "label_column": "hold a class in every row",
    "group_column": "hold a group in every row (an image that belongs to no other is a group of its own)",
}
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,999})(\.0+)?")  # 007 is a code; of more than 4,300 digits Python makes no number
SEPARATORS = "|;,"  # of several labels in one cell


def column(names: list[str], option: str, given: str, source: str) -> str | None:
    """The column of ``names`` that the option asks for, or one of a usual name.

    Returns: None for a split or group column that is not given and not there.
    Raises: UserError naming the option and the columns that there are.
    """
    there = listed("", names, 12) or "no column"
    if given:
        if given not in names:
            fail("data", option, f"be a column of {printable(source)} ({there})", repr(given))
        return given
    usual = USUAL[option]
    meant = [name for name in names if name.lower() in usual]
    best = sorted(meant, key=lambda name: usual.index(name.lower()))
    if best:
        return best[0]
    if option in ("split_column", "group_column"):
        return None
    fail("data", option, f"be given where no column is called {', '.join(usual)}", f"columns {there}")


def classes(values: dict[str, list[Any]], what: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(names of the classes, split -> int64 ``[N]``) of strings, integers, bools or whole floats.

    Whole numbers, also as text, are in their order and may have gaps, other classes in that of their names.

    Args:
        values: of each split, one for each image; None and "" are missing.
        what: for errors, ``label_column dx of labels.csv``.
    Raises: UserError for missing values, several labels in one, and numbers that are no classes.
    """
    each = {which: [_text(value, what) for value in of] for which, of in values.items()}
    every = Counter(text for of in each.values() for text in of)
    if missing := every[""]:
        fail("data", what, FILLED["label_column"], f"nothing in {counted(missing, 'row')}")
    _refuse_several(every, what)
    if all(_is_number(text) for text in every):
        measured = [text for text in every if not float(text).is_integer()]
        if measured:
            fail("data", what, "hold classes", f"{measured[0]} (cut measurements into classes first)")
    whole = all(WHOLE.fullmatch(text) for text in every)
    if whole:
        each = {which: [text.split(".")[0] for text in of] for which, of in each.items()}
    names = sorted({text for of in each.values() for text in of}, key=int if whole else None)
    if len(names) > CLASSES[1]:
        fail("data", "number of classes", f"be {CLASSES[0]} to {CLASSES[1]}", f"{len(names)} values in {what}")
    for name in names:
        if not name.isprintable():  # they stand in pages and in JSON
            fail("data", what, "hold names that can be printed", printable(name))
    number = {name: index for index, name in enumerate(names)}
    return tuple(names), {which: np.array([number[text] for text in of], np.int64) for which, of in each.items()}


def refuse_missing(values: list[Any], what: str, rule: str, numbers: list[int]) -> None:
    """Refuse a column with empty cells, and name the rows of the first ones by their ``numbers``."""
    if missing := [number for number, value in zip(numbers, values, strict=True) if not _text(value, what)]:
        rows = "row" if len(missing) == 1 else "rows"
        got = f"nothing in {counted(len(missing), 'row')} ({rows} {listed('', missing)} below the header)"
        fail("data", what, rule, got)


def groups(values: dict[str, list[Any]], what: str) -> dict[str, np.ndarray]:
    """split -> int64 ``[N]``, the number of each group in the order of their names.

    Raises: UserError for a missing group, and for one that lies in two splits.
    """
    each = {which: [_text(value, what) for value in of] for which, of in values.items()}
    if missing := sum(not text for of in each.values() for text in of):
        fail("data", what, FILLED["group_column"], f"nothing in {counted(missing, 'row')}")
    number = {name: index for index, name in enumerate(sorted(set().union(*each.values())))}
    result = {which: np.array([number[text] for text in of], np.int64) for which, of in each.items()}
    names = list(number)
    check_apart(result, what, lambda index: names[index])
    return result


def check_apart(numbers_of: dict[str, np.ndarray], what: str, name_of: Any = str) -> None:
    """Refuse a group that lies in two given splits."""
    where: dict[int, list[str]] = {}
    for which, of in numbers_of.items():
        for index in np.unique(of).tolist():
            where.setdefault(index, []).append(which)
    shared = {index: of for index, of in where.items() if len(of) > 1}
    if shared:
        named = [f"{name_of(index)} in {' and '.join(of)}" for index, of in shared.items()]
        remedy = "move all images of a group into one split, or leave the splits out, and they are cut by group"
        fail("data", what, "have each group in one split", f"{listed('group', named)} ({remedy})")


def split_names(values: list[Any], what: str) -> list[str]:
    """``train``, ``val`` or ``test`` for each row. Raises: UserError for another value, and without a train row."""
    texts = ["" if value is None else str(value).strip() for value in values]
    known = {text: split_name(text) for text in set(texts)}
    if unknown := sorted(text for text, which in known.items() if which is None):
        count = sum(known[text] is None for text in texts)
        got = f"{listed('', [each or 'nothing' for each in unknown])} in {counted(count, 'row')}"
        fail("data", what, "hold train, val or test in every row", got)
    if values and "train" not in known.values():
        fail("data", what, "hold train in some row", listed("", sorted(known)))
    return [known[text] for text in texts]


def by_split(rows: dict[str, list[Any]], which: list[str] | None) -> dict[str, dict[str, list[Any]]]:
    """name -> split -> values, of columns of one length; the one split ``all`` where ``which`` is None."""
    if which is None:
        return {name: {"all": values} for name, values in rows.items()}
    order = [each for each in ("train", "val", "test") if each in which]
    return {
        name: {each: [value for value, of in zip(values, which, strict=True) if of == each] for each in order}
        for name, values in rows.items()
    }


def _text(value: Any, what: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict | np.ndarray):
        several = "hold one label an image (several labels an image are not supported)"
        rule = "hold one group an image" if what.startswith("group_column") else several
        fail("data", what, rule, f"a list or record, {str(value)[:40]}")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _refuse_several(every: Counter, what: str) -> None:
    """Refuse ``A|B`` where ``A`` or ``B`` is a label by itself: several labels of one image."""
    for text in every:
        for separator in SEPARATORS:
            parts = [part.strip() for part in text.split(separator)]
            if len(parts) > 1 and any(part in every for part in parts):
                rule = "hold one label an image (several labels an image are not supported)"
                fail("data", what, rule, printable(text))
