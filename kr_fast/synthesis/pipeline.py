"""A whole data set: sampling, copying to the host, encoding and writing at the same time, on many processes."""

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any, Literal, overload

import torch

from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.progress import bar
from kr_fast.synthesis.device import DeviceShards
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.output.shards import Layout, Shards
from kr_fast.synthesis.output.sinks import Sink, TarSink, make_sink
from kr_fast.synthesis.output.writer import ShardThread
from kr_fast.synthesis.sampler import Sampler

POLL_SECONDS = 0.2  # how often a process without work looks whether the others are through


@dataclasses.dataclass(frozen=True)
class Synthesized:
    """What :func:`synthesize` did. ``images``, ``shards``: of the whole data set; ``written``: images by this process
    in this call; ``seconds``: of this call."""

    out: Path
    images: int
    shards: int
    written: int
    seconds: float


@overload
def synthesize(
    sampler: Sampler,
    plan: LabelPlan,
    out: str | Path,
    *,
    count: int | None = None,
    ids: range | None = None,
    format: str | Sink = "npy",
    shard_size: int = 16384,
    queue_size: int = 8,
    verify: bool = False,
) -> Synthesized: ...


@overload
def synthesize(
    sampler: Sampler,
    plan: LabelPlan,
    out: None,
    *,
    count: int | None = None,
    ids: range | None = None,
    format: Literal["device"],
    shard_size: int = 16384,
    queue_size: int = 8,
    verify: bool = False,
) -> DeviceShards: ...


def synthesize(
    sampler: Sampler,
    plan: LabelPlan,
    out: str | Path | None,
    *,
    count: int | None = None,
    ids: range | None = None,
    format: str | Sink = "npy",
    shard_size: int = 16384,
    queue_size: int = 8,
    verify: bool = False,
) -> Synthesized | DeviceShards:
    """Write the labelled images of ``ids`` to the folder ``out``, on all processes that call it; continue if it exists.

    Shard ``k`` holds the ids of ``[k S, (k + 1) S)``. Its bytes are a function of the manifest (sampler, plan, format)
    and so are the same for any number of processes, any order, and after any interruption. Processes are those of
    ``accelerate launch``, or several calls on one folder: each takes its share of the shards, then those that nobody
    has finished or is working on. There is no collective: a process that dies is replaced by the others. Each call
    returns when the whole data set is there.

    Args:
        sampler: on this process's device.
        plan: the class of each id.
        out: folder of the data set; None for ``format="device"``.
        count: ids ``range(count)``; the plan's own count by default.
        ids: a range of ids in place of ``count``.
        format: ``npy``, ``npz``, ``webdataset``, ``parquet`` (an extra), or a :class:`Sink` of one's own; ``device``
            keeps this process's shards on the sampler's device and returns them as :class:`DeviceShards`.
        shard_size: S. A multiple of the sampler's micro-batch wastes nothing.
        queue_size: batches that may wait for the writer.
        verify: compare what is there with its SHA-256, and make again what differs.

    Raises:
        UserError: for bad arguments; if ``out`` holds something else or another data set (the first differing manifest
            entry is named); if the network returns NaN or inf.
        OSError: if a shard cannot be written. No part of it is visible, and a later call continues.
    """
    layout = Layout(_ids(plan, count, ids), shard_size)
    if queue_size < 1:
        fail("synthesize", "queue_size", "be at least 1", queue_size)
    runtime = state.current()
    if format == "device":
        if out is not None:
            fail("synthesize", "out", "be None for the format device", out)
        held = DeviceShards(sampler, plan, ids=layout.ids, shard_size=shard_size)
        for shard in layout.shards[runtime.rank :: runtime.world_size]:
            held.shard(shard)
        return held
    if out is None:
        fail("synthesize", "out", "be a folder", out)
    sink = make_sink(format) if isinstance(format, str) else format
    name = format if isinstance(format, str) else type(format).__name__
    if isinstance(sink, TarSink) and layout.ids.stop > 10**TarSink.DIGITS:
        fail("synthesize", "ids", f"be below 10^{TarSink.DIGITS} in the format webdataset", layout.ids.stop - 1)
    if isinstance(format, str):
        _check_room(Path(out), len(layout.ids) * math.prod(sampler.output_shape))
    sampler.checked_labels(plan.pattern)
    first = torch.tensor([layout.ids.start])
    sampler.preflight(first, plan.labels(first))
    start = time.monotonic()
    shards = Shards(out, _manifest(sampler, plan, layout, sink, name), layout, sink)
    try:
        written = _Work(sampler, plan, shards, runtime).run(queue_size, verify)
    finally:
        shards.close()
    return Synthesized(shards.out, len(layout.ids), len(layout.shards), written, time.monotonic() - start)


def _ids(plan: LabelPlan, count: int | None, ids: range | None) -> range:
    if ids is not None and count is not None:
        fail("synthesize", "count", "be None where ids are given", count)
    if ids is None:
        count = plan.count if count is None else count
        if count is None:
            fail("synthesize", "count", "be given for a plan without an end", count)
        ids = range(count)
    if plan.count is not None and ids.stop > plan.count:
        fail("synthesize", "ids", f"lie in [0, {plan.count}), the plan's ids", ids)
    return ids


def _check_room(out: Path, size: int) -> None:
    """Images lie in every format as bytes, so a new data set takes at least ``size``."""
    if (out / "manifest.json").exists():
        return
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        rule = f"have room for {size / 2**30:.1f} GiB of images"
        fail("synthesize", "out", rule, f"{free / 2**30:.1f} GiB free in {there}")


def _manifest(sampler: Sampler, plan: LabelPlan, layout: Layout, sink: Sink, name: str) -> dict[str, Any]:
    return {
        "format": name,
        "first_id": layout.ids.start,
        "count": len(layout.ids),
        "shard_size": layout.size,
        "sink": sink.describe(),
        "labels": plan.describe(),
        "sampler": sampler.describe(),
    }


class _Work:
    """One process's part of a data set."""

    def __init__(self, sampler: Sampler, plan: LabelPlan, shards: Shards, runtime: state.Runtime):
        self.sampler, self.plan, self.shards, self.runtime = sampler, plan, shards, runtime

    def run(self, queue_size: int, verify: bool) -> int:
        """Until nothing is missing; returns the number of images written here."""
        shards, written = self.shards, 0
        missing = shards.missing(verify)
        with bar(len(shards.layout.ids), "synthesize", "img", shards.images_done()) as progress:
            if missing:
                whole_set = self.runtime.is_main and self.runtime.world_size > 1
                sizes = (self.plan.num_classes, self.sampler.micro_batch, queue_size)
                with ShardThread(shards, *sizes, progress, whole_set=whole_set) as thread:
                    self._all(thread, missing)
                written = thread.written
        shards.finish()
        return written

    def _all(self, thread: ShardThread, missing: list[int]) -> None:
        turn = [shard for shard in missing if shard % self.runtime.world_size == self.runtime.rank]
        while missing:
            found_work = False
            for shard in turn:
                if not self.shards.claims.take(shard):
                    continue
                if self.shards.is_done(shard):
                    self.shards.claims.free(shard)
                    continue
                found_work = True
                self._one(thread, shard)
            thread.flush()
            missing = self.shards.missing()
            # Now whatever is left, each process from another place on, so that where claims do not work two of them
            # seldom make the same shard.
            first = len(missing) * self.runtime.rank // self.runtime.world_size
            turn = missing[first:] + missing[:first]
            if missing and not found_work:
                time.sleep(POLL_SECONDS)

    def _one(self, thread: ShardThread, shard: int) -> None:
        thread.begin(shard)
        try:
            for batch in self.sampler.stream(self.plan, self.shards.layout.of(shard)):
                thread.put(batch)
        except UserError as error:
            raise UserError(f"{error} (shard {shard}, network {_source(self.sampler)})") from error


def _source(sampler: Sampler) -> str:
    """Where the network came from, and its digest."""
    path = getattr(getattr(sampler.unet, "config", None), "_name_or_path", None)
    digest = f"SHA-256 {sampler.describe()['network'][:12]}"
    return f"{path}, {digest}" if path else digest
