"""Poisson sampling in batches of a fixed physical size."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kr_fast.privacy.noise import NOT_PRIVATE, coins
from kr_fast.privacy.options import check_seed, number, whole
from kr_fast.runtime import state
from kr_fast.runtime.errors import fail

_OP = "PoissonBatches"


class Batch(NamedTuple):
    """A physical batch, a part of a logical one.

    Attributes:
        indices: int64 ``[physical_batch_size]`` of records; behind those drawn the first record stands in, absent.
        present: bool ``[physical_batch_size]``: which of them count.
        last: whether the logical batch ends with this one, so that ``step()`` follows.
        step: the logical batch's number, from 0.
    """

    indices: Tensor
    present: Tensor
    last: bool
    step: int


class PoissonBatches:
    """``steps`` logical batches, each holding every record with chance ``sample_rate``, independently of all others.

    This is the sampling that accountants assume for "Poisson". A logical batch is handed out in as many physical ones
    of ``physical_batch_size`` as it takes, at least one; a record is in it once at most. An empty one is a physical
    batch without a present record: noise is then added to nothing, and the step counts. Draws come from the operating
    system's entropy. Which records were drawn must stay secret: the accounting counts on it.

    Among several processes (Accelerate's) every rank draws from its own share of the records, by stride, and the union
    of the ranks' parts is the logical batch. Ranks may hand out different numbers of physical batches, but each the
    same number of logical ones.

    Args:
        records: how many there are in all, which neighbouring sets differ in by one: the accounting does not hide it.
        sample_rate: in (0, 1].
        steps: logical batches to hand out.
        physical_batch_size: records in a call of the network, on each rank.
        seed: for tests alone: the draws become a function of it, and are not private.
        not_private: True, said in words, where there is a ``seed``.
    Raises: UserError naming the argument.
    Source: Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019; masked
        batches of one size: arXiv:2406.17298.
    """

    def __init__(
        self,
        records: int,
        sample_rate: float,
        steps: int,
        physical_batch_size: int,
        *,
        seed: int | None = None,
        not_private: bool = False,
    ):
        self.records = whole(_OP, "records", records, 1)
        self.sample_rate = number(_OP, "sample_rate", sample_rate)
        if not 0 < self.sample_rate <= 1:
            fail(_OP, "sample_rate", "be in (0, 1]", sample_rate)
        self.steps = whole(_OP, "steps", steps, 0)
        self.physical_batch_size = whole(_OP, "physical_batch_size", physical_batch_size, 1)
        self._seed = check_seed(_OP, seed, not_private)
        runtime = state.current()
        self._own = runtime.shard(self.records)
        self._rank = [runtime.rank, runtime.world_size]
        if not len(self._own):
            fail(_OP, "records", f"be at least the {runtime.world_size} processes", records)
        self._step = 0
        self._left: Tensor | None = None  # of the logical batch that is being handed out; None: not drawn yet

    @property
    def expected_batch_size(self) -> float:
        """``records * sample_rate``: what ``make_private`` divides by."""
        return self.records * self.sample_rate

    @property
    def is_private(self) -> bool:
        """Whether the draws come from the operating system's entropy."""
        return self._seed is None

    def __repr__(self) -> str:
        text = f"{self.records} records, sample_rate={self.sample_rate}, step {self._step} of {self.steps}"
        return f"PoissonBatches({text}{'' if self.is_private else f', {NOT_PRIVATE}'})"

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left: a loop that was left goes on where it stopped."""
        size = self.physical_batch_size
        while self._step < self.steps:
            step = self._step
            if self._left is None:
                heads = coins(len(self._own), self.sample_rate, self._seed, "poisson", self._rank[0], step)
                self._left = torch.from_numpy(heads * self._own.step + self._own.start)
            indices = torch.full((size,), self._own.start)
            drawn = self._left[:size]
            indices[: len(drawn)] = drawn
            last = len(self._left) <= size
            self._left, self._step = (None, step + 1) if last else (self._left[size:], step)
            yield Batch(indices, torch.arange(size) < len(drawn), last, step)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands, also within a logical batch. It names drawn records: keep it where they are kept."""
        position = {"step": self._step, "left": None if self._left is None else self._left.clone()}
        return {**position, "private": self.is_private, "rank": list(self._rank), **self._fixed()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`: what is left of its logical batch comes first, and nothing is drawn again.

        Go on from a state within a logical batch once: two results of one draw spend more than two steps do.

        Raises: UserError for a state of other records, sample_rate, steps, processes or randomness.
        """
        for name, own in {**self._fixed(), "private": self.is_private, "rank": self._rank}.items():
            if values[name] != own:
                fail(_OP, name, f"be {own}, as it was when the state was saved", values[name])
        self._step = values["step"]
        self._left = None if values["left"] is None else values["left"].clone()

    def _fixed(self) -> dict[str, Any]:
        return {"records": self.records, "sample_rate": self.sample_rate, "steps": self.steps}
