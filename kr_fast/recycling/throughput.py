"""Images a second of synthesis, and how much of it passed while the Student was training."""

import contextlib
import threading
import time
from collections.abc import Iterator


class SynthesisClock:
    """Times the drawing of synthetic sets, by one thread or two, beside their user's waiting.

    ``images`` drawn; ``seconds``: of all of torch's threads, so that a call on half of them counts half as long;
    ``hidden``: the part of ``seconds`` in which the user of the sets did not wait for one.
    """

    def __init__(self):
        self.images, self.seconds, self.hidden = 0, 0.0, 0.0
        self._waited, self._since, self._lock = 0.0, None, threading.Lock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the user of the sets waits for the next one."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._waited, self._since = self._waited + time.perf_counter() - self._since, None

    @contextlib.contextmanager
    def drawing(self, images: int, share: float = 1.0) -> Iterator[None]:
        """While a thread draws ``images`` with this share of torch's threads."""
        waited, start = self._waited_until_now(), time.perf_counter()
        yield
        seconds, seen = time.perf_counter() - start, self._waited_until_now() - waited
        with self._lock:
            self.images += images
            self.seconds += share * seconds
            self.hidden += share * max(seconds - seen, 0.0)

    def _waited_until_now(self) -> float:
        with self._lock:
            return self._waited + (0.0 if self._since is None else time.perf_counter() - self._since)

    def figures(self) -> dict[str, float | None]:
        """{"synthesis": images a second, "hidden": share of the drawing}; None where nothing was drawn."""
        if not self.seconds:
            return {"synthesis": None, "hidden": None}
        return {"synthesis": self.images / self.seconds, "hidden": self.hidden / self.seconds}
