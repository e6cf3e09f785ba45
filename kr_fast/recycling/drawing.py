"""Synthetic sets by period: each is drawn while the one before is in use, by two threads where there are two.

An image is a function of its id, so which thread draws it, and when, changes no bit of it: both have equally many of
torch's threads, on which the last bits of torch's own kernels depend.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.recycling.throughput import SynthesisClock
from kr_fast.runtime.storage import files
from kr_fast.synthesis import LabelPlan, Sampler

# Bytes of a micro-batch in float32, above which two threads, a micro-batch each, draw a set no faster than one and take
# twice the memory. Measured: as fast at 9 MiB (16 of 224 px in colour), 1.2 times as fast at 6 MiB (128 of 64 px).
LARGE = 8 << 20

# Ids, labels and images (uint8 [n, H, W, C]) of a synthetic set.
Set = tuple[Tensor, Tensor, Tensor]
# Period -> its set.
Draw = Callable[[int], Set]


@dataclasses.dataclass(frozen=True)
class KeptSets:
    """Sets in files of ``folder``, for a later stage that uses them again.

    ``made_from``: what they depend on, as plain values.
    """

    folder: Path
    made_from: dict[str, Any]
    device: torch.device

    def discard_outdated(self) -> None:
        """Delete the folder's sets if they were made from something else."""
        record = self.folder / "made_from.json"
        if self.folder.exists() and (not record.exists() or files.read_json(record) != self.made_from):
            shutil.rmtree(self.folder)
        files.write_json(record, self.made_from)

    def path(self, period: int) -> Path:
        """The images' file; ids and labels lie beside it."""
        return self.folder / f"period-{period:04d}.npy"

    def __contains__(self, period: int) -> bool:
        return self.path(period).exists()

    def save(self, period: int, ids: Tensor, labels: Tensor, images: Tensor) -> None:
        """Write the set of ``period``."""
        for name, values in (("ids", ids), ("labels", labels)):
            files.save_array(self.path(period).with_suffix(f".{name}.npy"), values.cpu().numpy())
        files.save_array(self.path(period), images.cpu().numpy())  # last: it marks the set as complete

    def load(self, period: int) -> Set:
        """What :meth:`save` wrote."""
        path = self.path(period)
        ids, labels = (torch.from_numpy(np.load(path.with_suffix(f".{name}.npy"))) for name in ("ids", "labels"))
        return ids, labels, torch.from_numpy(np.load(path)).to(self.device)


def keeping(draw: Draw, kept: KeptSets | None) -> Draw:
    """``draw``, whose sets are kept, and read where they were kept before; ``draw`` itself where ``kept`` is None."""
    if kept is None:
        return draw

    def once(period: int) -> Set:
        if period in kept:
            return kept.load(period)
        result = draw(period)
        kept.save(period, *result)
        return result

    return once


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Draws ``images`` per period; period ``p`` has the ids from ``p * images`` on, which no other has.

    ``kept``: where sets are written, and read from if they are there; ``seen``: called with each period and its images;
    ``clock``: times the drawing.
    """

    sampler: Sampler
    plan: LabelPlan
    images: int
    kept: KeptSets | None = None
    seen: Callable[[int, Tensor], None] | None = None
    clock: SynthesisClock = dataclasses.field(default_factory=SynthesisClock, compare=False)

    def __call__(self, period: int) -> Set:
        size = self.sampler.micro_batch
        if self.images <= size or 4 * size * math.prod(self.sampler.output_shape) > LARGE:
            return _finished(self, period)  # with all of torch's threads for each micro-batch
        with ahead(self, [period]) as sets:
            return next(sets)


def fixed(draw: Draw) -> Draw:
    """The set of period 0 for every period; it is drawn once, when the first is asked for."""
    once = functools.cache(lambda: draw(0))
    return lambda period: once()


@contextlib.contextmanager
def ahead(draw: Draw, periods: Sequence[int]) -> Iterator[Iterator[Set]]:
    """The sets of ``periods``, one after the other.

    On a CPU with several threads a :class:`Drawing` draws the next set in a second thread while the caller uses a set,
    each with half of torch's threads; a caller who asks for the next one draws what is left of it too. With the last
    set the caller has all threads.

    Raises: whatever drawing a set raises, where that set is asked for.
    """
    threads = torch.get_num_threads()
    if not isinstance(draw, Drawing):
        yield map(draw, periods)
    elif draw.sampler.device.type != "cpu" or threads < 2:
        yield (_finished(draw, period) for period in periods)
    else:
        stop = threading.Event()
        try:
            with ThreadPoolExecutor(1, "kr_fast drawing") as pool:
                try:
                    yield _overlapped(draw, periods, pool, stop, threads)
                finally:
                    stop.set()  # before the pool waits for the micro-batch that is being drawn
        finally:
            torch.set_num_threads(threads)


def _finished(draw: Drawing, period: int) -> Set:
    """The set of ``period``, for which its user waits."""
    with draw.clock.waiting():
        return _Parts(draw, period).finished()


def _overlapped(
    draw: Drawing, periods: Sequence[int], pool: ThreadPoolExecutor, stop: threading.Event, threads: int
) -> Iterator[Set]:
    others = threads // 2

    def begin(period: int) -> tuple[_Parts, Future]:
        parts = _Parts(draw, period)
        return parts, pool.submit(parts.draw, others, stop, others / threads)

    following = begin(periods[0]) if periods else None
    for period in itertools.islice(itertools.chain(periods, [None]), 1, None):
        with draw.clock.waiting():
            parts, helper = following
            parts.draw(others, stop, others / threads)
            helper.result()
            following = None if period is None else begin(period)
            torch.set_num_threads(threads if following is None else threads - others)
            result = parts.finished()
        yield result


class _Parts:
    """A set in the making: micro-batches, each drawn by whichever thread comes first."""

    def __init__(self, draw: Drawing, period: int):
        self.drawing, self.period = draw, period
        self.ids = torch.arange(period * draw.images, (period + 1) * draw.images)
        self.labels = draw.plan.labels(self.ids)
        self.kept = draw.kept is not None and period in draw.kept
        size = draw.sampler.micro_batch
        parts = zip(self.ids.split(size), self.labels.split(size), strict=True)
        self.waiting = collections.deque(() if self.kept else enumerate(parts))
        self.images: list[Tensor | None] = [None] * len(self.waiting)

    def draw(self, threads: int, stop: threading.Event, share: float) -> None:
        """Draw what no thread has begun, with ``threads`` of torch's threads, this share of them all."""
        torch.get_num_threads()  # makes this thread take the common number now, and not at its first operator
        torch.set_num_threads(threads)
        while not stop.is_set():
            try:
                index, (ids, labels) = self.waiting.popleft()
            except IndexError:
                return
            try:
                with self.drawing.clock.drawing(len(ids), share):
                    self.images[index] = self.drawing.sampler(ids, labels)
            except BaseException:
                self.waiting.clear()  # for the other thread
                raise

    def finished(self) -> Set:
        """The whole set; what was not drawn yet is drawn now."""
        kept = self.drawing.kept
        if self.kept:
            result = kept.load(self.period)
        else:
            self._draw_rest()
            result = self.ids, self.labels, torch.cat(self.images)
            if kept is not None:
                kept.save(self.period, *result)
        if self.drawing.seen is not None:
            self.drawing.seen(self.period, result[2])
        return result

    def _draw_rest(self) -> None:
        """With all threads, or on a GPU, which is waited for so that the time is that of the drawing."""
        left = sum(len(ids) for _, (ids, _) in self.waiting)
        if not left:
            return
        with self.drawing.clock.drawing(left):
            for index, (ids, labels) in self.waiting:
                self.images[index] = self.drawing.sampler(ids, labels)
            if self.drawing.sampler.device.type == "cuda":  # needs a GPU
                torch.cuda.synchronize(self.drawing.sampler.device)
