"""All images through all models on a GPU: groups of models, chunks of images, queries, each step one captured graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kr_fast.ops.membership.membership_signals  # noqa: F401  (registers the op that a step calls)
from kr_fast.ensemble.inference.autotune import Tile
from kr_fast.ensemble.inference.batched_program import BatchedProgram
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ensemble.inference.runner import SignalRequest
from kr_fast.runtime import cuda_graph
from kr_fast.runtime.errors import fail, first_line
from kr_fast.runtime.log import logger

# Images of a call: to a file, a write waits for the device and the disk; and they lie on the device at a time.
IMAGES_AT_ONCE = 8192


class TiledRunner:
    """Runs a :class:`BatchedProgram` over all images, a tile of models and images in each step.

    Logits exist for one tile only. A step reads its images, query and labels from tensors that stay where they are, and
    leaves its results in others, so it can be captured once for each group of models and replayed.

    Args:
        count: number of models.
        size: ``(H, W, C)`` of the uint8 images; ``query``: whose view has the size of all that are asked for.
        capture: False runs the same calls one by one, on any device.
    """

    def __init__(
        self,
        program: BatchedProgram,
        tile: Tile,
        preprocessing: Preprocessing,
        size: tuple[int, int, int],
        query: Query,
        capture: bool,
    ):
        self.program, self.tile, self.count, self.preprocessing = program, tile, len(program.models), preprocessing
        self.classes, self.chunk = program.classes, tile.images
        self.view = preprocessing.view(query, size)
        device = program.device
        self.images = torch.zeros(tile.images, *size, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(tile.images, dtype=torch.int64, device=device)
        self.live = torch.zeros(tile.images, dtype=torch.bool, device=device)
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.groups = [slice(m, min(m + tile.models, self.count)) for m in range(0, self.count, tile.models)]
        self.set_capture(capture)

    def set_capture(self, capture: bool) -> None:
        """Whether steps are captured from now on, or launched one by one."""
        self.capture = capture
        self._steps: dict[tuple[int, tuple[str, ...]], tuple[Callable[[], None], dict[str, Tensor]]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if capture and torch.cuda.is_available() else None

    @property
    def recorded_chunk(self) -> int:
        """The bits of a library's kernel may follow from the chunk."""
        return self.chunk

    @property
    def record(self) -> dict[str, Any]:
        """As in :class:`runner.Runner`."""
        return {"models": self.tile.models, "images": self.tile.images, "layers": dict(self.program.kernels)}

    def fit(self, images: int) -> None:
        """Nothing: a tile was chosen for the device."""

    def images_at_once(self, queries: int, to_file: bool) -> int:
        """As in :class:`runner.Runner`."""
        return self.chunk * -(-IMAGES_AT_ONCE // self.chunk)

    @torch.inference_mode()
    def logits(self, images: Tensor, out: Tensor) -> None:
        """As in :class:`runner.Runner`."""

        def take(a: int, start: int, stop: int, group: slice, results: dict[str, Tensor]) -> None:
            out[group, start:stop].copy_(results["logits"][:, : stop - start])

        request = SignalRequest(images, None, (Query(),), ())
        self._run(request, range(len(images)), take, lambda models: None)

    @torch.inference_mode()
    def signals(self, request: SignalRequest, rows: range, out: dict[str, Tensor], done: Callable[[int], None]) -> None:
        """As in :class:`runner.Runner`."""
        size = (len(request.queries), len(rows), self.count)
        # On the device, so that results are copied to the host once.
        whole = {name: torch.empty(size, dtype=torch.float32, device=self.program.device) for name in request.want}

        def take(a: int, start: int, stop: int, group: slice, results: dict[str, Tensor]) -> None:
            for name, values in whole.items():
                values[a, start - rows.start : stop - rows.start, group].copy_(results[name][:, : stop - start].T)

        self._run(request, rows, take, done)
        if bool(self.bad):
            fail("ModelArray", "models", "give logits without NaN, +inf or rows of -inf only", "some that are not so")
        for name, values in whole.items():
            out[name].copy_(values)

    def _run(self, request: SignalRequest, rows: range, take: Callable, done: Callable[[int], None]) -> None:
        """``take(query, start, stop, group, results)`` for every chunk of ``rows``, query and group."""
        size = tuple(self.images.shape[1:])
        views = [self.preprocessing.index(query, size) for query in request.queries]
        resident = request.images[rows.start : rows.stop].to(self.program.device)  # once for all groups and queries
        steps = [self._step(group, request.want) for group in self.groups]
        self.bad.fill_(False)  # what the warm-ups of a capture saw was no image
        for group, (step, results) in zip(self.groups, steps, strict=True):
            for start in range(rows.start, rows.stop, self.chunk):
                stop = min(start + self.chunk, rows.stop)
                count = stop - start
                self.images[:count].copy_(resident[start - rows.start : stop - rows.start])
                self.images[count:].zero_()
                self.live[:count].fill_(True)
                self.live[count:].fill_(False)
                if request.labels is not None:
                    self.labels[:count].copy_(request.labels[start:stop])
                for a, (index_rows, columns) in enumerate(views):
                    self.view.rows.copy_(index_rows)
                    self.view.columns.copy_(columns)
                    step()
                    take(a, start, stop, group, results)
                    done(group.stop - group.start)

    def _step(self, group: slice, want: tuple[str, ...]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        if (group.start, want) not in self._steps:
            self._steps[group.start, want] = self._make(group, want)
        return self._steps[group.start, want]

    def _make(self, group: slice, want: Sequence[str]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        models, images = group.stop - group.start, self.chunk
        shapes = dict.fromkeys(want, (models, images)) or {"logits": (models, images, self.classes)}
        exact = {"dtype": torch.float32, "device": self.program.device}
        results = {name: torch.empty(size, **exact) for name, size in shapes.items()}

        def run() -> None:
            logits = self.program.run(group, self.images, self.view)
            if not want:
                results["logits"].copy_(logits)
                return
            self.bad.logical_or_((~logits.amax(2).isfinite() & self.live).any())
            flat, labels = logits.flatten(0, 1), self.labels.repeat(models)
            values = torch.ops.kr_fast.membership_signals(flat, labels, ",".join(want))
            for name, value in zip(want, values, strict=True):
                results[name].copy_(value.view(models, images))

        if self.capture:
            try:
                return cuda_graph.capture(run, pool=self._pool).replay, results
            except RuntimeError as error:  # a wait or an allocation of a module's own, which no capture may have
                self.capture, why = False, first_line(error)
                logger.warning("ModelArray: steps are launched one by one, for they cannot be captured: %s", why)
        return run, results
