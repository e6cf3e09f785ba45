"""What runs the models of an array for images of one size: the protocol, and the loop that takes a model at a time."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kr_fast.ensemble.inference import parallel
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ensemble.networks import answer
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.runtime import memory
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import Images

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNKS_TO_FILE = 64  # chunks of images and queries between two writes to a file
# Bytes of packed weights: of all models together, that stay bound between calls, and of models bound at a time where
# they are more.
MOST_BOUND, BOUND_AT_ONCE = 256 << 20, 64 << 20


@dataclasses.dataclass(frozen=True)
class ArrayOptions:
    """The options of :class:`ModelArray`, which documents them. Raises: UserError."""

    dtype: torch.dtype
    bn: str = "eval"
    chunk: int | None = None
    kernels: str = "measured"
    normalize: tuple[float | Sequence[float], float | Sequence[float]] | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            fail("ModelArray", "dtype", "be float32, bfloat16, float16 or float64", self.dtype)
        if self.bn not in ("eval", "batch"):
            fail("ModelArray", "bn", "be 'eval' or 'batch'", self.bn)
        number = isinstance(self.chunk, int) and not isinstance(self.chunk, bool)
        if self.chunk is not None and not (number and self.chunk >= 1):
            fail("ModelArray", "chunk", "be an integer above 0", self.chunk)
        if self.kernels not in ("measured", "own"):
            fail("ModelArray", "kernels", "be 'measured' or 'own'", self.kernels)


@dataclasses.dataclass(frozen=True)
class SignalRequest:
    """Signals ``want`` of uint8 ``images`` ``[N, H, W, C]`` with ``labels`` ``[N]``, for each of ``queries``."""

    images: Images
    labels: Tensor
    queries: Sequence[Query]
    want: tuple[str, ...]


class Runner(Protocol):
    """All models of an array for images and views of one size.

    Attributes:
        classes: number of logits.
        chunk: images that go through the layers together.
        recorded_chunk: the chunk where the bits of an answer follow from it, else what the user asked for.
        record: steps and kernels that were chosen by measuring, which a run that continues another takes; or None.
    """

    classes: int
    chunk: int
    recorded_chunk: int | None
    record: dict[str, Any] | None

    def fit(self, images: int) -> None:
        """Choose a chunk for about so many images."""

    def images_at_once(self, queries: int, to_file: bool) -> int | None:
        """How many images one call of :meth:`signals` takes; None for all."""

    def logits(self, images: Images, out: Tensor) -> None:
        """uint8 ``[N, H, W, C]`` -> ``out`` ``[M, N, classes]``. Raises: UserError if a chunk does not fit."""

    def signals(self, request: SignalRequest, rows: range, out: dict[str, Tensor], done: Callable[[int], None]) -> None:
        """Signals of the images ``rows`` into ``out``: name -> ``[A, len(rows), M]``.

        ``done(n)`` is called for each chunk and query, as n models have it.

        Raises: UserError for logits that are not finite, and if a chunk does not fit.
        """


class PerModelRunner(abc.ABC):
    """Chunk after chunk of images, and in each model after model, as :meth:`bind` gives them.

    A subclass sets ``input_dtype``, ``classes`` and ``bytes_per_image`` (of activations that live at a time), and

    - ``parallel``: whether chunks go side by side through a CPU's threads, one in each;
    - ``padded``: whether every chunk has the same number of images, the last with black ones;
    - ``channels_first``: how images lie in memory.
    """

    parallel, padded, channels_first = False, False, False
    bytes_per_image, record = 0, None
    chunk: int
    classes: int
    input_dtype: torch.dtype

    def start(self, models: Sequence[nn.Module], options: ArrayOptions, device: torch.device, weight_bytes: int):
        """``weight_bytes``: of one model, bound."""
        self.models, self.device, self.options = models, device, options
        self.preprocessing = Preprocessing(options.normalize, device)
        self.keeps = weight_bytes * len(models) <= MOST_BOUND
        self.together = len(models) if self.keeps else max(BOUND_AT_ONCE // weight_bytes, 1)
        self._bound: dict[int, Callable] = {}

    @property
    @abc.abstractmethod
    def recorded_chunk(self) -> int | None:
        """As in :class:`Runner`."""

    @abc.abstractmethod
    def fit(self, images: int) -> None:
        """As in :class:`Runner`."""

    @abc.abstractmethod
    def make(self, m: int) -> Callable[[Tensor], Tensor]:
        """Model ``m`` as a function from a chunk ``[chunk, C, H, W]`` of ``input_dtype`` to its logits."""

    def bind(self, m: int) -> Callable[[Tensor], Tensor]:
        """:meth:`make`, once for each model where all of them fit MOST_BOUND bytes."""
        if m in self._bound:
            return self._bound[m]
        run = self.make(m)
        if self.keeps:
            self._bound[m] = run
        return run

    def images_at_once(self, queries: int, to_file: bool) -> int | None:
        """As in :class:`Runner`."""
        return self.chunk * max(CHUNKS_TO_FILE // queries, 1) if to_file else None

    def logits(self, images: Images, out: Tensor) -> None:
        """As in :class:`Runner`."""

        def store(a: int, start: int, stop: int, m: int, logits: Tensor) -> None:
            out[m, start:stop] = logits

        self._run(images, (Query(),), range(len(images)), store, lambda models: None)

    def signals(self, request: SignalRequest, rows: range, out: dict[str, Tensor], done: Callable[[int], None]) -> None:
        """As in :class:`Runner`."""

        def reduce(a: int, start: int, stop: int, m: int, logits: Tensor) -> None:
            for name, values in membership_signals(logits, request.labels[start:stop], request.want).items():
                out[name][a, start - rows.start : stop - rows.start, m] = values.cpu()

        self._run(request.images, request.queries, rows, reduce, done)

    @torch.inference_mode()
    def _run(self, images: Images, queries: Sequence[Query], rows: range, take: Callable, done: Callable) -> None:
        """``take(query, start, stop, model, logits)`` for every chunk of ``rows``, query and model."""
        chunks = [(a, start) for start in range(rows.start, rows.stop, self.chunk) for a in range(len(queries))]
        on_threads, count = self.parallel and self.device.type == "cpu", len(self.models)
        threads = max(min(torch.get_num_threads() if on_threads else 1, len(chunks) * count), 1)
        self._check_memory(threads)

        def work(a: int, start: int, models: list) -> None:
            stop = min(start + self.chunk, rows.stop)
            size = self.chunk if self.padded else stop - start
            x = self.preprocessing.batch(images[start:stop], queries[a], size, self.input_dtype)
            x = x.contiguous() if self.channels_first else x
            for m, model in models:
                logits = answer("ModelArray", "models", model, x, self.classes)
                take(a, start, stop, m, logits[: stop - start].float())

        for first in range(0, count, self.together):
            bound = [(m, self.bind(m)) for m in range(first, min(first + self.together, count))]
            # Few chunks: the models of one are shared out too, so that every thread has work.
            parts = min(len(bound), -(-4 * threads // max(len(chunks), 1))) if threads > 1 else 1
            cuts = [len(bound) * part // parts for part in range(parts + 1)]
            items = [(*chunk, bound[cuts[p] : cuts[p + 1]]) for chunk in chunks for p in range(parts)]
            sizes = iter([len(models) for *_, models in items])
            if on_threads:
                parallel.run(items, work, min(threads, len(items)), lambda sizes=sizes: done(next(sizes)))
            else:
                for item in items:
                    work(*item)
                    done(next(sizes))
                    del item
            del bound, items  # before the next models are bound

    def _check_memory(self, threads: int) -> None:
        need, free = self.bytes_per_image * threads, memory.free_memory(self.device)
        if need * self.chunk > free:
            size = max(free // max(need, 1), 1)
            fail("ModelArray", "chunk", f"be at most {size} for the {free >> 20} MiB that are free", self.chunk)
