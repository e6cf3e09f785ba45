"""Amounts and tables as text for people."""

import re
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """``3.0 s``, ``12.0 min``, ``5.2 h``, ``3.1 days``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def short_duration(seconds: float) -> str:
    """``1.23 s``, ``45.6 ms``, ``789 us``: three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def seconds(text: str) -> int | None:
    """Seconds of ``90s``, ``30m``, ``2h`` or ``1h30m``; None for anything else, and for nothing at all."""
    found = re.fullmatch(r"(?=.)(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?", text)
    return (
        sum(int(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else None
    )


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Rows of cells as lines with aligned columns; ``right``: aligned at their right ends.

    A row with fewer cells than the longest one is a sentence: only its first cell sets a width.
    """
    count = max(map(len, rows))
    widths = [max(len(row[k]) for row in rows if len(row) == count or k == 0) for k in range(count)]
    pad = str.rjust if right else str.ljust
    return ["  ".join(pad(*pair) for pair in zip(row, widths, strict=False)).rstrip() for row in rows]
