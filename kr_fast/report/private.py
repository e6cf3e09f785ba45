"""What pages say and leave out because it belongs to single persons or to the institution."""

import re
import shlex
from pathlib import Path
from typing import Any


def banner(real_images: bool, records: bool) -> str:
    """The words at the top of a page that shows real images or single records; nothing for one that shows neither."""
    shown = [words for words, is_shown in (("real images", real_images), ("single records", records)) if is_shown]
    if not shown:
        return ""
    return (
        f"This page shows {' and '.join(shown)} of the private data, because it was asked for. It must not leave the "
        "institution that owns them."
    )


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for a page: of every path only its last part, for folders name machines and people."""
    return {key: _last(value) for key, value in config.items()}


def repeated(command: str, config: Path) -> str:
    """What repeats or continues ``kr-fast COMMAND``, told from the folder that holds its own: a page names no other."""
    out = config.resolve().parent.name
    return shlex.join(["kr-fast", command, "--config", f"{out}/{config.name}", "--out", out])


def _last(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_last(each) for each in value]
    # NAME=FILE@MODEL and A,B hold several names.
    return re.sub(r"[^=,@]*/", "", value) if isinstance(value, str) else value
