"""Progress bars of the main process, on a terminal or in a notebook and not in files.

``KR_FAST_PROGRESS=0`` turns bars off, ``KR_FAST_PROGRESS=1`` on wherever the output goes.
"""

import os
import sys

from kr_fast.runtime import state

_quiet = False


def quiet(value: bool) -> None:
    """Whether this process shows no bars, whatever the environment says."""
    global _quiet
    _quiet = value


def _hidden() -> bool:
    setting = os.environ.get("KR_FAST_PROGRESS")
    if _quiet or setting == "0":
        return True
    # A bar redraws its line, which fills a log file. A notebook's output is no terminal, but shows bars.
    return not (setting == "1" or sys.stderr.isatty() or "ipykernel" in sys.modules)


class bar:
    """``with bar(total, "teacher", "epoch") as progress: progress.update(); progress.set(accuracy=0.9)``.

    Without a description there is no bar: a part of a longer job calls ``update`` all the same.
    """

    def __init__(self, total: int, description: str | None, unit: str = "it", done: int = 0):
        from tqdm.auto import tqdm

        hidden = description is None or _hidden() or not state.current().is_main
        self._bar = tqdm(total=total, desc=description, unit=unit, initial=done, disable=hidden, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self._bar.update(count)

    def at(self, done: int) -> None:
        """``done`` units are done in all."""
        self._bar.update(max(0, done - self._bar.n))

    def set(self, **values: object) -> None:
        """Show ``values`` behind the bar."""
        self._bar.set_postfix(values, refresh=False)

    def __enter__(self) -> "bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
