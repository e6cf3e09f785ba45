"""All images through all models on a GPU: blocks of models, chunks of images, queries, each step one captured graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kr_fast.ops.membership.membership_signals  # noqa: F401  (registers the op that a step calls)
from kr_fast.ensemble.inference.blocks import Batched
from kr_fast.ensemble.inference.choosing import Plan, captured
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ops.batched.model_conv2d import View
from kr_fast.runtime.errors import fail, first_line
from kr_fast.runtime.log import logger

PIECE = 8192  # images between two writes to a file: a write waits for the device and the disk


class Sweep:
    """Runs a :class:`Batched` program over all images. Logits exist for one chunk of one block of models only.

    A step reads its images, query and labels from tensors that stay where they are, and leaves its results in others,
    so it can be captured once for each block and replayed.

    Args:
        size: ``(H, W, C)`` of the uint8 images.
        view: the query's tensors, which every step reads; :func:`view_of` makes them.
        capture: False runs the same calls one by one, on any device.
    """

    def __init__(self, program: Batched, plan: Plan, count: int, size: tuple[int, int, int], view: View, capture: bool):
        self.program, self.plan, self.count, self.view, self.capture = program, plan, count, view, capture
        self.classes, self.chunk = program.classes, plan.images
        self.piece = plan.images * -(-PIECE // plan.images)
        device = program.device
        self.images = torch.zeros(plan.images, *size, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(plan.images, dtype=torch.int64, device=device)
        self.live = torch.zeros(plan.images, dtype=torch.bool, device=device)
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.blocks = [slice(m, min(m + plan.models, count)) for m in range(0, count, plan.models)]
        self._steps: dict[tuple[int, tuple[str, ...]], tuple[Callable[[], None], dict[str, Tensor]]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None

    @property
    def record(self) -> dict[str, Any]:
        """What was chosen by measuring: a run that continues another takes the same."""
        return {"models": self.plan.models, "images": self.plan.images, "layers": dict(self.program.kernels)}

    @torch.inference_mode()
    def logits(self, images: Tensor, query: Query, out: Tensor) -> None:
        """uint8 ``[N, H, W, C]`` -> ``out`` ``[M, N, classes]``."""

        def take(a: int, start: int, stop: int, block: slice, found: dict[str, Tensor]) -> None:
            out[block, start:stop].copy_(found["logits"][:, : stop - start])

        self._run(images, None, (query,), (), range(len(images)), take, lambda models: None)

    @torch.inference_mode()
    def signals(
        self, images: Tensor, labels: Tensor, queries: Sequence[Query], want: tuple[str, ...], rows: range,
        out: dict[str, Tensor], done: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Signals of the images ``rows`` into ``out``: name -> ``[A, len(rows), M]`` on any device.

        ``done(models)`` is called for each chunk, query and block.

        Raises: UserError for logits that are NaN or +inf, or all -inf.
        """
        here = {
            name: torch.empty(len(queries), len(rows), self.count, device=self.program.device) for name in want
        }  # one copy to the host a piece, not one a step

        def take(a: int, start: int, stop: int, block: slice, found: dict[str, Tensor]) -> None:
            for name, values in here.items():
                values[a, start - rows.start : stop - rows.start, block].copy_(found[name][:, : stop - start].T)

        self._run(images, labels, queries, want, rows, take, done)
        if bool(self.bad):
            fail("ModelArray", "models", "give logits without NaN, +inf or rows of -inf only", "some that are not so")
        for name, values in here.items():
            out[name].copy_(values)

    def _run(self, images, labels, queries, want, rows, take, done) -> None:
        device, views = self.program.device, [self._index(query) for query in queries]
        resident = images[rows.start : rows.stop].to(device)  # once for all blocks and queries
        steps = [self._step(block, want) for block in self.blocks]
        self.bad.fill_(False)  # what the rehearsals of a capture saw was no image
        for block, (step, found) in zip(self.blocks, steps, strict=True):
            for start in range(rows.start, rows.stop, self.chunk):
                stop = min(start + self.chunk, rows.stop)
                size = stop - start
                self.images[:size].copy_(resident[start - rows.start : stop - rows.start])
                self.images[size:].zero_()
                self.live[:size].fill_(True)
                self.live[size:].fill_(False)
                if labels is not None:
                    self.labels[:size].copy_(labels[start:stop])
                for a, (index_rows, columns) in enumerate(views):
                    self.view.rows.copy_(index_rows)
                    self.view.columns.copy_(columns)
                    step()
                    take(a, start, stop, block, found)
                    done(block.stop - block.start)

    def _index(self, query: Query) -> tuple[Tensor, Tensor]:
        return tuple(each.to(self.program.device) for each in index_of(query, *self.images.shape[1:3]))

    def _step(self, block: slice, want: tuple[str, ...]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        if (block.start, want) not in self._steps:
            self._steps[block.start, want] = self._make(block, want)
        return self._steps[block.start, want]

    def _make(self, block: slice, want: tuple[str, ...]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        models, images = block.stop - block.start, self.chunk
        shapes = dict.fromkeys(want, (models, images)) or {"logits": (models, images, self.classes)}
        found = {name: torch.empty(size, device=self.program.device) for name, size in shapes.items()}

        def run() -> None:
            logits = self.program.run(block, self.images, self.view)
            if not want:
                found["logits"].copy_(logits)
                return
            self.bad.logical_or_((~logits.amax(2).isfinite() & self.live).any())
            flat, labels = logits.flatten(0, 1), self.labels.repeat(models)
            values = torch.ops.kr_fast.membership_signals(flat, labels, ",".join(want))
            for name, value in zip(want, values, strict=True):
                found[name].copy_(value.view(models, images))

        if self.capture:
            try:
                return captured(run, self._pool).replay, found
            except RuntimeError as error:  # a sync or an allocation of a module's own that a capture forbids
                self.capture = False
                why = first_line(error)
                logger.warning("ModelArray: steps are launched one by one, for they cannot be captured: %s", why)
        return run, found


def index_of(query: Query, height: int, width: int) -> tuple[Tensor, Tensor]:
    """int32 source rows and columns of a query's view."""
    found = query.index(height, width) or (torch.arange(height), torch.arange(width))
    return tuple(each.to(torch.int32) for each in found)


def view_of(query: Query, size: tuple[int, int, int], normalize: tuple | None, device: torch.device) -> View:
    """The tensors of a query on ``device``; ``normalize`` as in ModelArray."""
    channels = size[2]
    mean, std = (0.5, 0.5) if normalize is None else normalize
    mean, std = (torch.as_tensor(each, dtype=torch.float64).expand(channels) for each in (mean, std))
    numbers = (1 / (255 * std), -mean / std)
    index = (each.to(device) for each in index_of(query, *size[:2]))
    return View(*index, *(each.float().contiguous().to(device) for each in numbers))
