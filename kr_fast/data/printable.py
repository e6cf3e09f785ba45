"""Names of files and folders in one line of a message, whatever characters they hold."""

from collections.abc import Sequence
from typing import Any


def printable(name: Any) -> str:
    """``name`` with line breaks, control characters and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def counted(count: int, what: str) -> str:
    """``1 file``, ``2 files``, ``2 classes``; of ``file* that are read``, the plural stands at the star."""
    end = "" if count == 1 else "es" if what.endswith("s") and "*" not in what else "s"
    return f"{count} {what.replace('*', end) if '*' in what else what + end}"


def listed(what: str, names: Sequence[Any], most: int = 3) -> str:
    """``2 keys: a, b``, or ``a, b`` without ``what``; from ``most`` names on the rest is counted."""
    text = ", ".join(printable(name) for name in names[:most])
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{counted(len(names), what)}: {text}{rest}" if what else text + rest
