"""Who is a member, and who is under attack at all: masks or indices, as tensors, arrays, lists or files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.runtime.array_files import damage, read_npy, regular_file
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_mask, as_tensor, binary, described

SUFFIXES = (".npy", ".txt", ".csv")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # of Windows' editors; that of UTF-8 is "utf-8-sig"'s
WORDS = {"true": 1, "false": 0}


def pool_of(members: Any, non_members: Any, count: int) -> tuple[Tensor, Tensor | None]:
    """(bool mask over the pool, indices of the pool in all ``count`` examples or None for all of them).

    ``members`` and ``non_members`` are masks ``[N]`` (see :func:`as_mask`) or indices; whole numbers of any dtype.
    Without ``non_members`` all others are non-members, with them an example that is in neither is left out.
    """
    inside = chosen("members", members, count)
    if non_members is None:
        check_members(inside, count)
        return inside, None
    outside = chosen("non_members", non_members, count)
    both = (inside & outside).nonzero()[:, 0]
    if len(both):
        fail("audit", "members and non_members", "be disjoint", f"{len(both)} examples in both, {int(both[0])} first")
    index = (inside | outside).nonzero()[:, 0]
    check_members(inside[index], len(index))
    return inside[index], None if len(index) == count else index


def check_members(members: Any, count: int) -> Tensor:
    """The mask ``[N]`` of members, of which there must be some and not all."""
    if members is None:
        fail("audit", "members", f"be bool [{count}]", None)
    mask = as_mask("audit", "members", members, 1)
    if len(mask) != count:
        fail("audit", "members", f"be bool [{count}]", described(members))
    inside = int(mask.sum())
    if not 0 < inside < count:
        fail("audit", "members", "hold members and non-members", f"{inside} of {count} members")
    return mask


def scored(where: str, scores: Any, members: Any, name: str = "scores") -> tuple[Tensor, Tensor]:
    """(scores ``[N]`` without NaN, bool ``[N]`` with both kinds) on the CPU. Raises: UserError naming the argument."""
    values, mask = as_numbers(where, name, scores).cpu(), as_mask(where, "members", members, 1).cpu()
    if values.ndim != 1 or len(values) != len(mask):
        fail(where, name, f"have shape [{len(mask)}], as members", list(values.shape))
    if bad := int(torch.isnan(values).sum()):
        fail(where, name, "not hold NaN", f"{bad} NaN")
    inside = int(mask.sum())
    if not 0 < inside < len(mask):
        fail(where, "members", "hold members and non-members", f"{inside} of {len(mask)} members")
    return values, mask


def chosen(name: str, value: Any, count: int, where: str = "audit") -> Tensor:
    """The mask ``[count]`` of a mask or of indices. 0 and 1, as many as examples, are a mask: indices would repeat."""
    if value is None:
        fail(where, name, f"be bool [{count}] or indices", None)
    values = as_tensor(where, name, value).detach()
    rule = f"be bool [{count}], or indices in [0, {count}) without repetition"
    if values.ndim == 2 and 1 in values.shape:
        values = values.reshape(-1)
    if values.ndim != 1 or values.dtype.is_complex or (values.dtype == torch.bool and len(values) != count):
        fail(where, name, rule, described(value))
    if values.dtype == torch.bool:
        return values.cpu()
    if values.dtype.is_floating_point and not bool((values == values.round()).all() & values.isfinite().all()):
        fail(where, name, rule, f"{described(value)} with {values[values != values.round()][:1].tolist() or 'inf'}")
    marks = binary(values)
    if marks and len(values) == count:
        return (values != 0).cpu()
    index = values.long()
    low, high = (int(index.min()), int(index.max())) if len(index) else (0, 0)
    if low < 0 or high >= count:
        hint = " (they start at 0)" if (low, high) == (1, count) else ""
        fail(where, name, rule, f"indices from {low} to {high}{hint}")
    if len(index.unique()) != len(index):
        got = f"{len(index)} indices, {len(index.unique())} of them distinct"
        fail(where, name, rule, f"a mask of {len(index)} examples" if marks else got)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index.cpu()] = True
    return mask


def read_members(path: Path, name: str) -> np.ndarray:
    """The numbers of a file: ``.npy``, or text (``.txt``, ``.csv``) of one column or one line.

    Text is UTF-8 or, with its mark, UTF-16; whole numbers (``1.0`` too) or true and false; ``#`` starts a comment; the
    first line of a ``.csv`` may be a title.

    Raises: UserError naming the file, and the line; FileNotFoundError.
    """
    if path.suffix.lower() == ".npy":
        return read_npy(path, "audit", name)
    what = f"audit: {name}"
    regular_file(path, what)
    with damage(f"{what} must be a readable text file", path):
        data = path.read_bytes()
        text = data.decode(MARKS.get(data[:2], "utf-8-sig"))
    rows, title = [], path.suffix.lower() == ".csv"
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip("\"' ") for cell in re.split(r"[,;\s]+", line.split("#")[0].strip()) if cell]
        values = [_whole(cell) for cell in cells]
        if not cells:
            continue
        first, title = title, False
        if None in values and first:
            continue
        if None in values:
            got = f"{path} (line {number}: {line.strip()[:40]!r})"
            raise UserError(f"{what} must be a file of indices or a mask, got {got}")
        rows.append(values)
    if len(rows) > 1 and max(map(len, rows)) > 1:
        rule = "be a file of one column, as DataFrame.to_csv(columns=[name], index=False) writes it"
        fail("audit", name, rule, f"{max(map(len, rows))} columns in {path}")
    flat = [value for row in rows for value in row]
    if not flat:
        fail("audit", name, "be a file of indices or a mask", f"{path} without numbers")
    return np.array(flat, dtype=np.int64)


def _whole(cell: str) -> int | None:
    """The integer that a cell holds, or None."""
    try:
        value = WORDS[cell.lower()] if cell.lower() in WORDS else float(cell)
    except ValueError:
        return None
    return int(value) if abs(value) < 2**53 and value == int(value) else None
