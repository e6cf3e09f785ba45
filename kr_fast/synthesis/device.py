"""Shards in the sampler's device memory, without a disk: what training on synthetic images reads from."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.output.shards import Layout
from kr_fast.synthesis.sampler import Batch, Sampler


class DeviceShards:
    """Images by id, sampled when they are first asked for and kept on the sampler's device.

    With ``capacity`` shards the memory is a ring: the next shard takes the place of the one that was made first, and an
    image that is asked for again is the same again, because it is a function of its id.

    Args:
        sampler: where the images come from and stay.
        plan: the class of each id.
        ids: the ids of the data set; by default all of the plan.
        shard_size: ids sampled together: shard ``k`` holds those of ``[k S, (k + 1) S)``.
        capacity: shards in memory; None for as many as are asked for.
    Raises: UserError naming the argument.
    """

    def __init__(
        self,
        sampler: Sampler,
        plan: LabelPlan,
        *,
        ids: range | None = None,
        shard_size: int = 16384,
        capacity: int | None = None,
    ):
        if ids is None and plan.count is None:
            fail("DeviceShards", "ids", "be given for a plan without an end", ids)
        if capacity is not None and capacity < 1:
            fail("DeviceShards", "capacity", "be at least 1 or None", capacity)
        self.layout = Layout(range(plan.count) if ids is None else ids, shard_size)
        self.sampler, self.plan, self.capacity = sampler, plan, capacity
        self._held: dict[int, Batch] = {}  # in the order in which they were made

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the shards in memory, oldest first."""
        return tuple(self._held)

    def shard(self, number: int) -> Batch:
        """Shard ``number``: ids and labels int64 ``[S]``, images uint8 ``[S, H, W, C]``, on the sampler's device.

        In a ring the tensors are overwritten when the shard gives way to another. Raises: UserError where there is no
        such shard.
        """
        if number not in self.layout.shards:
            low, high = self.layout.shards[0], self.layout.shards[-1]
            fail("DeviceShards", "number", f"lie in [{low}, {high}]", number)
        if number not in self._held:
            self._held[number] = self._make(number)
        return self._held[number]

    def _make(self, number: int) -> Batch:
        room = None
        if self.capacity is not None and len(self._held) == self.capacity:
            room = self._held.pop(next(iter(self._held)))
        ids, device = self.layout.of(number), self.sampler.device
        if room is None or len(room.ids) != len(ids):
            room = None  # freed before its successor is made
            images = self._empty(len(ids))
        else:
            images = room.images
        numbers = torch.arange(len(ids)) + ids.start
        labels, done = self.plan.labels(numbers), 0
        for batch in self.sampler.stream(self.plan, numbers):
            images[done : done + len(batch.ids)] = batch.images
            done += len(batch.ids)
        return Batch(numbers.to(device), labels.to(device), images)

    def _empty(self, count: int) -> Tensor:
        channels, height, width = self.sampler.output_shape
        return torch.empty(count, height, width, channels, dtype=torch.uint8, device=self.sampler.device)

    def __getitem__(self, ids: Tensor) -> Batch:
        """The images of any ids of the data set, int64 ``[B]``, in their order: copies, on the sampler's device."""
        if ids.ndim != 1 or ids.dtype != torch.int64:
            fail("DeviceShards", "ids", "be int64 [B]", f"{ids.dtype} {list(ids.shape)}")
        ids, all_ids = ids.cpu(), self.layout.ids
        if len(ids) and (ids.min() < all_ids.start or ids.max() >= all_ids.stop):
            got = f"[{int(ids.min())}, {int(ids.max())}]"
            fail("DeviceShards", "ids", f"lie in [{all_ids.start}, {all_ids.stop})", got)
        images, device = self._empty(len(ids)), self.sampler.device
        number = ids // self.layout.size
        for shard in number.unique().tolist():
            position = (number == shard).nonzero()[:, 0].to(device)
            row = (ids[number == shard] - self.layout.of(shard).start).to(device)
            images[position] = self.shard(shard).images[row]
        return Batch(ids.to(device), self.plan.labels(ids).to(device), images)

    def __iter__(self) -> Iterator[Batch]:
        """All shards in order."""
        for number in self.layout.shards:
            yield self.shard(number)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.layout.ids)
