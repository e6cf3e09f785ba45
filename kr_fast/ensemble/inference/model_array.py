"""M models of one architecture as one object: logits ``[M, N, C]`` and membership signals ``[A, N, M]``."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.graph.architecture import Comparison, as_modules
from kr_fast.ensemble.inference.build import build
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.queries import Query, as_queries
from kr_fast.ensemble.inference.runner import ArrayOptions, Runner, SignalRequest
from kr_fast.ensemble.signal_files import SignalFiles, recorded
from kr_fast.ops.membership.membership_signals import SIGNALS
from kr_fast.runtime import memory
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images, as_labels
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage.image_rows import Images, hash_images
from kr_fast.runtime.version import __version__


class ModelArray:
    """Models that are asked together, in eval mode.

    The architecture is traced once (torch.fx); every BatchNorm that follows a convolution or linear layer is folded
    into it in float64; ReLU, GELU, SiLU, Hardswish, sigmoid and residual sums join the convolution before them; all
    other layers run as they are. Weights are taken at the first images, or at every call where they exceed 256 MiB: do
    not change them. A module that cannot be traced or folded runs by its own forward, model after model, and one log
    line says so.

    In eval mode a traced network's answer for an image has the same bits whatever images and models stand beside it and
    whatever the chunk and the number of threads (on one machine, with one torch): on a CPU, and on a GPU with
    ``kernels="own"`` but for layers that have no kernel for all models. A GPU's measured kernels may be the library's,
    whose bits follow the chunk and the number of models.

    Args:
        models: at least one ``nn.Module``, or state dict of ``make_model()``, of one architecture, class count and
            device; float ``[N, C, H, W]`` to logits ``[N, K]``. They are kept, and put in eval mode.
        make_model: returns a fresh module for state dicts.
        dtype: of the computation: float32, bfloat16, float16 or float64; None for the models' own. Weights are folded
            in float64 whatever it is; signals are taken from float32 logits. On a CPU in half precision the
            image, the convolution that reads it, pooled features and logits stay in float32 (precision.py).
        bn: "eval" (running statistics) or "batch": every BatchNorm takes mean and biased variance over the images of
            a chunk (one query each) and ignores its running statistics, all else stays in eval mode. That is what the
            published LiRA code does with ``training=True`` over 5,000 consecutive images at a time (Carlini et al.,
            2022): an answer then depends on the images beside it.
        chunk: images that go through all layers of a model together; None to choose by the cache (5,000 for
            ``bn="batch"``).
        kernels: of a GPU, where steps and kernels are chosen by measuring when the first images come: "measured", or
            "own" for the package's own kernels alone, with which bits do not depend on the number of models either.
        normalize: (mean, std), numbers or one for each channel: a model sees ``(x / 255 - mean) / std``. None for
            ``x / 127.5 - 1``, which the package's own training uses.
    Raises: UserError naming the first module or parameter that differs, or that holds a non-finite number.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | Mapping[str, Tensor]],
        make_model: Callable[[], nn.Module] | None = None,
        *,
        dtype: torch.dtype | None = None,
        bn: str = "eval",
        chunk: int | None = None,
        kernels: str = "measured",
        normalize: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
    ):
        self.models = as_modules("ModelArray", models, make_model)
        Comparison("ModelArray").models(self.models)
        tensors = [*self.models[0].parameters(), *self.models[0].buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.own_dtype = next((value.dtype for value in tensors if value.is_floating_point()), torch.float32)
        self.dtype = self.own_dtype if dtype is None else dtype
        self.options = ArrayOptions(self.dtype, bn, chunk, kernels, normalize)
        self.bn, self.normalize = bn, normalize
        self.runners: dict[tuple[int, ...], Runner] = {}  # by the images' height, width, channels and the view's size

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ModelArray({len(self)} x {type(self.models[0]).__name__}, {dtype}, {self.device}, bn={self.bn!r})"

    def __call__(self, images: Images) -> Tensor:
        """Logits: uint8 ``[N, H, W, C]`` -> float32 ``[M, N, classes]``, on the models' device.

        Raises: UserError naming the argument.
        """
        images = as_images("ModelArray", "images", images)
        runner = self._runner(images, images.shape[1:3])
        each, free = 4 * len(self) * runner.classes, memory.free_memory(self.device)
        if each * len(images) > free:
            rule = f"number at most {free // each} for their logits to fit in the {free >> 20} MiB that are free"
            fail("ModelArray", "images", rule, len(images))
        out = torch.empty(len(self), len(images), runner.classes, dtype=torch.float32, device=self.device)
        runner.logits(images, out)
        return out

    def signals(
        self,
        images: Images,
        labels: Tensor,
        *,
        augment: str | Sequence[Query] = "none",
        want: tuple[str, ...] = ("phi",),
        path: str | Path | None = None,
        description: str | None = None,
    ) -> dict[str, Tensor]:
        """Membership signals of every model for every query: name -> float32 ``[A, N, M]`` on the CPU.

        Images stay uint8, queries are index arithmetic, and logits exist only for one chunk of one model and query.

        Args:
            images: uint8 ``[N, H, W, C]``.
            labels: integers ``[N]`` or ``[N, 1]`` in [0, classes).
            augment: the queries: "none" (1), "flip" (2: as is, mirrored), "shift" (5: as is and one pixel in each
                direction, borders replicated), "lira" (18: flips and shifts in the order of the published code,
                borders reflected), or a sequence of :class:`kr_fast.ensemble.Query`.
            want: names of :func:`kr_fast.ops.membership.membership_signals.membership_signals`.
            path: folder for ``<name>.npy``; results are memory maps of these. A call that was interrupted continues
                where it stopped; a call of other models, images or options is refused.
            description: shows a progress bar under this name.
        Raises: UserError naming the argument; OSError if the disk is full.
        """
        images = as_images("ModelArray", "images", images)
        queries = as_queries(augment, *images.shape[1:3])
        want = tuple(want)
        for name in want:
            if name not in SIGNALS:
                fail("ModelArray", "want", f"hold names among {', '.join(SIGNALS)}", name)
        count = len(images)
        runner = self._runner(images, queries[0].view_size(*images.shape[1:3]), recorded(path, "kernels"))
        labels = as_labels("ModelArray", "labels", labels, count, runner.classes).to(self.device)
        request = SignalRequest(images, labels, queries, want)
        shape = (len(queries), count, len(self))
        pairs = len(queries) * len(self)
        size, free = 4 * len(want) * pairs * count, memory.free_memory(torch.device("cpu"))
        if path is None and size > free:
            fail("ModelArray", "path", f"be given for {size >> 20} MiB of signals with {free >> 20} MiB free", None)
        with contextlib.ExitStack() as stack:
            store = None
            if path is not None:
                store = stack.enter_context(SignalFiles(path, want, shape, self._record(runner, request)))
            first = store.done if store else 0
            total, before = (pairs * -(-n // runner.chunk) for n in (count, first))
            progress = stack.enter_context(bar(total, description, "chunk", before))
            step = runner.images_at_once(len(queries), store is not None) or max(count, 1)
            whole = {} if store else {name: torch.empty(shape, dtype=torch.float32) for name in want}
            for start in range(first, count, step):
                rows = range(start, min(start + step, count))
                out = {name: values[:, start : rows.stop] for name, values in whole.items()}
                if store:
                    out = {name: torch.empty(len(queries), len(rows), len(self), dtype=torch.float32) for name in want}
                runner.signals(request, rows, out, progress.update)
                if store:
                    store.write(rows.start, rows.stop, out)
            return store.read() if store else whole

    def _runner(self, images: Images, size: tuple[int, int], record: dict | None = None) -> Runner:
        """For views of ``size``; with the steps and kernels of ``record``, where there is one."""
        key = (*images.shape[1:], *size)
        runner = self.runners.get(key)
        if runner is None or (record and runner.record not in (None, record)):
            preprocessing = Preprocessing(self.normalize, self.device)
            runner = build(self.models, self.options, preprocessing, self.own_dtype, images, size, record)
            self.runners[key] = runner
        runner.fit(len(images))
        return runner

    def _record(self, runner: Runner, request: SignalRequest) -> dict[str, Any]:
        """What the signals are functions of."""
        weights = hashlib.sha256()
        for model in self.models:
            for name, value in model.state_dict().items():
                weights.update(name.encode())
                if isinstance(value, Tensor):
                    weights.update(_bytes_of(value))
        return {
            "images": _digest(request.images),
            "labels": hashlib.sha256(_bytes_of(request.labels)).hexdigest(),
            "weights": weights.hexdigest(),
            "models": len(self),
            "queries": [[q.flip, q.down, q.right, q.border, q.size and list(q.size)] for q in request.queries],
            "want": list(request.want),
            "dtype": str(self.dtype).removeprefix("torch."),
            "bn": self.bn,
            "chunk": runner.recorded_chunk,
            "normalize": repr(self.normalize),
            "device": self.device.type,
            **({} if runner.record is None else {"kernels": runner.record}),
            "versions": {"torch": torch.__version__, "kr_fast": __version__},
        }


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory where it is dense, and no copy of it."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(images: Images) -> str:
    digest = hashlib.sha256()
    hash_images(digest, images)
    return digest.hexdigest()
