"""The thread that writes shards while the next batch is sampled."""

import queue
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.progress import bar
from kr_fast.synthesis.output.shards import Shards
from kr_fast.synthesis.sampler import Batch


class _Stopped(Exception):
    """The caller gave up in the middle of a shard."""


class _Slot:
    """Page-locked memory for one batch on its way from a GPU, and the event that says that it has arrived."""

    def __init__(self, like: Tensor, rows: int):  # needs a GPU
        self.images = torch.empty((rows, *like.shape[1:]), dtype=torch.uint8, pin_memory=True)
        self.arrived = torch.cuda.Event()


class _QueuedBatch(NamedTuple):
    ids: Tensor
    labels: Tensor
    images: Tensor
    slot: _Slot | None


class ShardThread:
    """``with ShardThread(...) as thread: thread.begin(k); thread.put(batch); ...; thread.flush()``.

    ``put`` returns at once while fewer than ``queue_size`` batches wait. An error of the thread is raised by the next
    call here, with its cause. Leaving the block by an error, an interrupt too, finishes the shards whose batches are
    all here and abandons the one that is not whole. ``rows`` is the largest batch; with ``whole_set`` the progress bar
    also moves by what other processes have finished.
    """

    def __init__(self, shards: Shards, classes: int, rows: int, queue_size: int, progress: bar, *, whole_set: bool):
        self.written, self._rows = 0, rows
        self._shards, self._classes, self._progress, self._whole_set = shards, classes, progress, whole_set
        self._queue: queue.Queue[Any] = queue.Queue(queue_size)
        self._free: queue.Queue[_Slot] = queue.Queue()
        self._slots, self._stream = 0, None
        self._error: BaseException | None = None
        self._shard, self._ended = -1, False
        self._thread = threading.Thread(target=self._run, name="kr_fast shards", daemon=True)

    def __enter__(self) -> "ShardThread":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def begin(self, shard: int) -> None:
        """The batches that follow are those of ``shard``, whose claim the thread gives back."""
        self._put(shard)

    def put(self, batch: Batch) -> None:
        """The next batch, on any device."""
        if batch.images.device.type != "cuda":
            self._put(_QueuedBatch(batch.ids, batch.labels, batch.images.contiguous(), None))
            return
        slot, count, device = self._slot(batch.images), len(batch.images), batch.images.device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            slot.images[:count].copy_(batch.images, non_blocking=True)
            slot.arrived.record(self._stream)
        batch.images.record_stream(self._stream)  # its memory is not given to others before the copy
        self._put(_QueuedBatch(batch.ids.cpu(), batch.labels.cpu(), slot.images[:count], slot))

    def flush(self) -> None:
        """Wait until all shards that were put are done."""
        through = threading.Event()
        self._put(through)
        through.wait()
        self._raise()

    def _slot(self, images: Tensor) -> _Slot:
        """Memory that nobody uses. As many as batches can be under way, then the oldest that comes back."""
        if self._slots < self._queue.maxsize + 2:
            self._slots += 1
            return _Slot(images, self._rows)
        return self._free.get()

    def _put(self, item: Any) -> None:
        self._raise()
        self._queue.put(item)

    def _raise(self) -> None:
        error = self._error
        if error is None:
            return
        what = f"shard {self._shard} in {self._shards.out}"
        if isinstance(error, UserError):
            raise error
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{what} could not be written: {error.strerror or error}") from error
        raise RuntimeError(f"synthesize: {what} could not be written: {error!r}") from error

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                else:
                    self._write(item)
        except _Stopped:
            pass
        except BaseException as error:  # raised by the next call from outside
            self._error = error
        while not self._ended:  # so that nobody waits for room in the queue, or for a slot
            item = self._take()
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, _QueuedBatch):
                self._give_back(item)

    def _take(self) -> Any:
        item = self._queue.get()
        self._ended = item is None
        return item

    def _give_back(self, queued: _QueuedBatch) -> None:
        if queued.slot is not None:
            self._free.put(queued.slot)

    def _write(self, shard: int) -> None:
        self._shard, count = shard, len(self._shards.layout.of(shard))
        with self._shards.writing(shard) as outputs:
            done, writer = 0, None
            while done < count:
                queued = self._take()
                if queued is None:
                    raise _Stopped
                if queued.slot is not None:
                    queued.slot.arrived.synchronize()
                if writer is None:
                    shape = tuple(queued.images.shape[1:])
                    writer = self._shards.sink.writer(outputs, count, shape, self._classes)
                writer.write(queued.ids, queued.labels, queued.images)
                self._give_back(queued)
                done += len(queued.ids)
                self._progress.update(len(queued.ids))
            writer.close()
        self._shards.claims.free(shard)
        self.written += count
        if self._whole_set:
            self._progress.at(self._shards.images_done())
