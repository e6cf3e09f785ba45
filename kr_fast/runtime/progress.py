"""Progress bars of the main process, on a terminal or in a notebook and not in files.

``KR_FAST_PROGRESS=0`` turns bars off, ``KR_FAST_PROGRESS=1`` on wherever the output goes.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from kr_fast.runtime import state

# (description of a bar, its unit, how many are done, values) -> None.
Listener = Callable[[str, str, int, Mapping[str, float]], None]
_quiet = False
_listeners: list[Listener] = []


def quiet(value: bool) -> None:
    """Whether this process shows no bars, whatever the environment says."""
    global _quiet
    _quiet = value


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with the values that bars of the main process are set to, whether they are shown or not."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


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

        self._heard = description is not None and state.current().is_main
        self._description, self._unit, self._done = description, unit, done
        hidden = not self._heard or _hidden()
        self._bar = tqdm(total=total, desc=description, unit=unit, initial=done, disable=hidden, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self._done += count
        self._bar.update(count)

    def at(self, done: int) -> None:
        """``done`` units are done in all."""
        self.update(max(0, done - self._done))

    def set(self, **values: float) -> None:
        """Show ``values`` behind the bar."""
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
        for listener in _listeners if self._heard else ():
            listener(self._description, self._unit, self._done, values)

    def __enter__(self) -> "bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
