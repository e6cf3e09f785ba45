"""Rank, device and precision, from Accelerate and from nowhere else."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Iterator
from typing import Any

import torch

from kr_fast.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One process among ``world_size``."""

    rank: int
    world_size: int
    device: torch.device
    mixed_precision: str  # "no" | "bf16" | "fp16": what training uses on this device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that decides, writes and shows progress."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's share of ``range(count)``, by stride."""
        return range(self.rank, count, self.world_size)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def added(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' ``value``, on every rank."""
        if self.world_size == 1:
            return value
        total = value.to(self.device, copy=True)  # a GPU's collectives take no tensor of the host
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[bool]:
        """Yields whether this is rank 0; the others wait at the end until rank 0 is done, and fail if it failed.

        Raises: on the others UserError for an error that a user can correct (also OSError), else RuntimeError.
        """
        error: BaseException | None = None
        try:
            yield self.is_main
        except BaseException as caught:
            error = caught
            raise
        finally:
            by_user = isinstance(error, UserError | OSError)
            failed = self.broadcast(None if error is None else (by_user, str(error) if by_user else repr(error)))
            if failed is not None and not self.is_main:
                raise (UserError if failed[0] else RuntimeError)(f"rank 0 failed: {failed[1]}")


@functools.cache
def current() -> Runtime:
    """The state of this process, asked once.

    One process without ``accelerate launch`` too. Stages in which the other ranks wait can be long, so the process
    group's time-out is a day and not the usual ten minutes.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without cpu=True, each of several processes on a machine without a GPU would have rank 0 of 1.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=1))
    bf16 = state.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Runtime(state.process_index, state.num_processes, state.device, "bf16" if bf16 else "no")
