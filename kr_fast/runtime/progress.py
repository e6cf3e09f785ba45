"""Progress bars on the main process. ``KR_FAST_PROGRESS=0`` turns them off."""

import os

from tqdm import tqdm

from kr_fast.runtime import state


class bar:
    """``with bar(total, "teacher", "epoch") as progress: progress.update(); progress.set(accuracy=0.9)``.

    Without a description there is no bar: a part of a longer job calls ``update`` all the same.
    """

    def __init__(self, total: int, description: str | None, unit: str = "it", done: int = 0):
        hidden = description is None or os.environ.get("KR_FAST_PROGRESS") == "0" or not state.current().is_main
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
