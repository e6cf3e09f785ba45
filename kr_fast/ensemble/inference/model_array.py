"""M models of one architecture as one object: logits ``[M, N, C]`` and membership signals ``[A, N, M]``."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.graph import architecture
from kr_fast.ensemble.graph.tracing import Unsupported
from kr_fast.ensemble.inference.blocks import Batched
from kr_fast.ensemble.inference.checking import check_all, is_close, own_answer, shown
from kr_fast.ensemble.inference.choosing import Plan, choose, plans
from kr_fast.ensemble.inference.eager import Eager
from kr_fast.ensemble.inference.program import Program
from kr_fast.ensemble.inference.queries import Query, as_queries
from kr_fast.ensemble.inference.sweep import Sweep, view_of
from kr_fast.ensemble.networks import answer, own_words
from kr_fast.ensemble.signal_files import SignalFiles, recorded
from kr_fast.ensemble.training import parallel
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_images, as_labels
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import free_memory
from kr_fast.runtime.progress import bar
from kr_fast.runtime.version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFERENCE_BATCH = 5000
AMONG = 4  # images, of which two are looked at: an answer may not follow from the others
PIECES = 64  # pieces of work between two writes to a file
BATCHED = ("cuda",)  # device types on which models are batched
# How far, beside the largest, logits may lie from those of other kernels.
ROOM = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


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
        self.models = architecture.as_modules(models, make_model)
        architecture.check_same(self.models)
        held = [*self.models[0].parameters(), *self.models[0].buffers()]
        self.device = held[0].device if held else torch.device("cpu")
        self.own_dtype = next((value.dtype for value in held if value.is_floating_point()), torch.float32)
        self.dtype = self.own_dtype if dtype is None else dtype
        if self.dtype not in DTYPES:
            fail("ModelArray", "dtype", "be float32, bfloat16, float16 or float64", self.dtype)
        if bn not in ("eval", "batch"):
            fail("ModelArray", "bn", "be 'eval' or 'batch'", bn)
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            fail("ModelArray", "chunk", "be an integer above 0", chunk)
        if kernels not in ("measured", "own"):
            fail("ModelArray", "kernels", "be 'measured' or 'own'", kernels)
        self.bn, self._chunk, self._kernels, self.normalize = bn, chunk, kernels, normalize
        self._programs: dict[tuple[int, ...], Program | Eager | Sweep] = {}

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ModelArray({len(self)} x {type(self.models[0]).__name__}, {dtype}, {self.device}, bn={self.bn!r})"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits: uint8 ``[N, H, W, C]`` -> float32 ``[M, N, classes]``, on the models' device."""
        images = as_images("ModelArray", "images", images)
        program = self._program(images, images.shape[1:3])
        each, free = 4 * len(self) * program.classes, free_memory(self.device)
        if each * len(images) > free:
            rule = f"number at most {free // each} for their logits to fit in the {free >> 20} MiB that are free"
            fail("ModelArray", "images", rule, len(images))
        out = torch.empty(len(self), len(images), program.classes, device=self.device)
        if isinstance(program, Sweep):
            program.logits(images, Query(), out)
            return out

        def keep(a: int, start: int, stop: int, m: int, logits: Tensor) -> None:
            out[m, start:stop] = logits

        self._run(program, images, (Query(),), range(0, len(images)), keep, lambda pairs: None)
        return out

    def signals(
        self,
        images: Tensor,
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
        program = self._program(images, queries[0].view_size(*images.shape[1:3]), recorded(path, "kernels"))
        labels = as_labels("ModelArray", "labels", labels, count, program.classes).to(self.device)
        shape = (len(queries), count, len(self))
        pairs = len(queries) * len(self)
        size, free = 4 * len(want) * pairs * count, free_memory(torch.device("cpu"))
        if path is None and size > free:
            fail("ModelArray", "path", f"be given for {size >> 20} MiB of signals with {free >> 20} MiB free", None)
        with contextlib.ExitStack() as stack:
            store = None
            if path is not None:
                record = self._record(program, images, labels, queries, want)
                store = stack.enter_context(SignalFiles(path, want, shape, record))
            first = store.done if store else 0
            total, before = (pairs * -(-n // program.chunk) for n in (count, first))
            progress = stack.enter_context(bar(total, description, "chunk", before))
            step = program.chunk * max(PIECES // len(queries), 1) if store else max(count, 1)
            if isinstance(program, Sweep):
                step = program.piece
            whole = {} if store else {name: torch.empty(shape) for name in want}
            for start in range(first, count, step):
                rows = range(start, min(start + step, count))
                out = {name: values[:, start : rows.stop] for name, values in whole.items()}
                if store:
                    out = {name: torch.empty(len(queries), len(rows), len(self)) for name in want}
                self._signals(program, images, labels, queries, want, rows, out, progress.update)
                if store:
                    store.write(rows.start, rows.stop, out)
            return store.read() if store else whole

    def _signals(self, program, images, labels, queries, want, rows, out, done) -> None:
        if isinstance(program, Sweep):
            program.signals(images, labels, queries, want, rows, out, done)
            return

        def reduce(a: int, start: int, stop: int, m: int, logits: Tensor) -> None:
            for name, values in membership_signals(logits, labels[start:stop], want).items():
                out[name][a, start - rows.start : stop - rows.start, m] = values.cpu()

        self._run(program, images, queries, rows, reduce, done)

    @torch.inference_mode()
    def _run(self, program, images, queries, rows, take, done) -> None:
        """``take(query, start, stop, model, logits)`` for every chunk of ``rows``, query and model.

        Then ``done(pairs)`` of a chunk (of one query) and a model.
        """
        chunks = [(a, start) for start in range(rows.start, rows.stop, program.chunk) for a in range(len(queries))]
        parallel_ = program.parallel and self.device.type == "cpu"
        threads = max(min(torch.get_num_threads() if parallel_ else 1, len(chunks) * len(self)), 1)
        self._check_memory(program, threads)

        def work(a: int, start: int, models: list) -> None:
            stop = min(start + program.chunk, rows.stop)
            size = program.chunk if program.padded else stop - start
            x = self._chunk_of(images[start:stop], queries[a], size, program.input_dtype)
            x = x.contiguous() if isinstance(program, Eager) else x  # as a loop over the models shows them
            for m, model in models:
                logits = answer("ModelArray", "models", model, x, program.classes)
                take(a, start, stop, m, logits[: stop - start].float())

        for first in range(0, len(self), program.together):
            bound = [(m, program.bind(m)) for m in range(first, min(first + program.together, len(self)))]
            # Few chunks: the models of one are shared out too, so that every thread has work.
            parts = min(len(bound), -(-4 * threads // max(len(chunks), 1))) if threads > 1 else 1
            cuts = [len(bound) * part // parts for part in range(parts + 1)]
            items = [(*chunk, bound[cuts[p] : cuts[p + 1]]) for chunk in chunks for p in range(parts)]
            sizes = iter([len(models) for *_, models in items])
            if parallel_:
                parallel.run(items, work, min(threads, len(items)), lambda sizes=sizes: done(next(sizes)))
            else:
                for item in items:
                    work(*item)
                    done(next(sizes))
                    del item
            del bound, items  # before the next group is bound

    def _chunk_of(self, images: Tensor, query: Query, size: int, dtype: torch.dtype) -> Tensor:
        """One query of some images as the models see them: ``[size, C, h, w]``, channels_last, padded."""
        images = images.to(self.device)
        index = query.index(*images.shape[1:3])
        if index is not None:
            rows, columns = (each.to(self.device) for each in index)
            images = images[:, rows[:, None], columns]
        x = torch.zeros(size, *images.shape[1:], device=self.device)
        x[: len(images)] = images
        if self.normalize is None:
            x.div_(127.5).sub_(1)
        else:
            mean, std = (torch.as_tensor(each, dtype=torch.float32, device=self.device) for each in self.normalize)
            x.div_(255).sub_(mean).div_(std)
        return x.to(dtype).permute(0, 3, 1, 2)

    def _program(self, images: Tensor, size: tuple[int, int], record: dict | None = None) -> Program | Eager | Sweep:
        """For views of ``size``; with the steps and kernels of ``record``, where there is one."""
        key = (*images.shape[1:], *size)
        known = self._programs.get(key)
        if known is None or (record and isinstance(known, Sweep) and known.record != record):
            self._programs[key] = self._build(images, size, record)
        found = self._programs[key]
        if not isinstance(found, Sweep):
            found.fit(len(images), free_memory(self.device))
        return found

    @torch.inference_mode()
    def _build(self, images: Tensor, size: tuple[int, int], record: dict | None) -> Program | Eager | Sweep:
        two = shown(images)
        sample = self._chunk_of(two, Query(size=tuple(size)), 2, self.own_dtype)
        wanted, why = own_answer(self.models[0], sample)
        if self.bn == "batch":
            return Eager(self.models, sample, self.dtype, self._chunk or REFERENCE_BATCH, batch_norm=True)
        try:
            if why is not None:
                raise Unsupported(why)
            return self._traced(two, size, sample, wanted, len(images), record)
        except Unsupported as reason:
            logger.warning("ModelArray: models run one by one in their own forward: %s", reason)
        return Eager(self.models, sample, self.dtype, self._chunk, batch_norm=False)

    def _traced(self, two: Tensor, size, sample: Tensor, wanted: Tensor, images: int, record) -> Program | Sweep:
        """Raises Unsupported."""
        why = None
        if self.device.type in BATCHED and self.dtype != torch.float64:
            try:
                return self._batched(two, size, sample, wanted, record)
            except Unsupported as reason:
                why = reason
        try:
            program = Program(self.models, sample, self.dtype, self._chunk, images)
            self._verify(program, two, size, sample, wanted)
        except (Unsupported, UserError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of a forward that runs, in its own order, on tensors that lie otherwise
            raise Unsupported(f"its trace does not run ({own_words(error)})") from None
        if why is not None:
            logger.warning("ModelArray: models run one after the other: %s", why)
        return program

    def _batched(self, two: Tensor, size: tuple[int, int], sample: Tensor, wanted: Tensor, record) -> Sweep:
        """All models at once. Raises Unsupported."""
        if record and self._chunk not in (None, record["images"]):
            fail("ModelArray", "chunk", f"be {record['images']}, as in the signals that are continued", self._chunk)
        program = Batched(self.models, sample, self.dtype)
        pixels = tuple(two.shape[1:])
        view, two = view_of(Query(size=tuple(size)), pixels, self.normalize, self.device), two.to(self.device)
        candidates = plans(program, len(self), self._chunk, free_memory(self.device))
        models = candidates[0].models
        own, blocks = program.kernels, [slice(m, min(m + models, len(self))) for m in range(0, len(self), models)]
        found = torch.cat([program.try_run(block, two, view) for block in blocks])
        check_all(self.models, lambda m: found[m], sample, wanted, self.dtype)
        if record:
            plan, program.kernels = Plan(record["models"], record["images"]), program.only(record["layers"])
        elif self._kernels == "own":
            plan = candidates[0]
        else:
            plan = choose(program, candidates, two[:1], view)
        if program.kernels != own:  # what was chosen by its speed has to give the same answers
            again = program.try_run(blocks[0], two, view)
            if not is_close(again, found[blocks[0]], ROOM[self.dtype], ROOM[self.dtype]):
                if record:
                    fail("ModelArray", "kernels", "give the answers that the record's gave", record["layers"])
                logger.warning("ModelArray: these kernels give other logits and are not used: %s", program.kernels)
                plan, program.kernels = candidates[0], own
        return Sweep(program, plan, len(self), pixels, view, capture=self.device.type == "cuda")

    def _verify(self, program: Program, two: Tensor, size, sample: Tensor, wanted: Tensor) -> None:
        """Raises Unsupported where a program does not give the models' answers, to two images among others."""
        count = min(program.chunk, AMONG)
        chunk = self._chunk_of(two, Query(size=tuple(size)), max(count, 2), program.input_dtype)

        def logits(m: int) -> Tensor:
            return program.bind(m)(chunk[:count] if m == 0 else chunk[:2])[:2]

        check_all(self.models, logits, sample, wanted, self.dtype)

    def _check_memory(self, program: Program | Eager, threads: int) -> None:
        need, free = program.bytes_per_image * threads, free_memory(self.device)
        if need * program.chunk > free:
            size = max(free // max(need, 1), 1)
            fail("ModelArray", "chunk", f"be at most {size} for the {free >> 20} MiB that are free", program.chunk)

    def _record(self, program, images, labels, queries, want) -> dict[str, Any]:
        """What the signals are functions of."""
        weights = hashlib.sha256()
        for model in self.models:
            for name, value in model.state_dict().items():
                weights.update(name.encode())
                if isinstance(value, Tensor):
                    weights.update(_bytes_of(value))
        return {
            "images": _digest(images),
            "labels": _digest(labels),
            "weights": weights.hexdigest(),
            "models": len(self),
            "queries": [[q.flip, q.down, q.right, q.border, q.size and list(q.size)] for q in queries],
            "want": list(want),
            "dtype": str(self.dtype).removeprefix("torch."),
            "bn": self.bn,
            "chunk": self._chunk if isinstance(program, Program) else program.chunk,  # bits of a trace do not follow it
            "normalize": repr(self.normalize),
            "device": self.device.type,
            **({"kernels": program.record} if isinstance(program, Sweep) else {}),
            "versions": {"torch": torch.__version__, "kr_fast": __version__},
        }


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory where it is dense, and no copy of it."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()
