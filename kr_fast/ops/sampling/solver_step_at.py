"""A solver step that a counter in device memory chooses, so that one captured CUDA graph serves a whole trajectory."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import SolverRow, SolverTableStep
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import define
from kr_fast.ops.sampling.solver_step import MAX_HISTORY, limits_of


@dataclasses.dataclass(frozen=True)
class DeviceTable:
    """The rows of a trajectory on a device, and where in two ring buffers its tensors lie.

    ``rows``: float32 ``[T, 16]``, a :class:`SolverRow`'s numbers (x0_sample, x0_model, clip, sample, model, x0, noise,
    next_input, keep[3]), four history coefficients and their number. ``slots``: int32 ``[T, 8]``, the ring slots of
    the sample, of the next sample, of what is kept or -1, 0, then of the history: a kept slot ``k``, or ``-1 - s`` for
    a sample slot ``s``. The first sample goes into sample slot 0, the last is left in slot ``last``.
    """

    rows: Tensor
    slots: Tensor
    sample_slots: int
    kept_slots: int
    last: int
    noisy: bool
    quantile: float

    @classmethod
    def build(
        cls, rows: Sequence[SolverRow], sources: Sequence[Sequence[tuple[int, str]]], device: torch.device | str
    ) -> "DeviceTable":
        """The table of ``rows`` with the history that ``sources`` names, in as few slots as its lifetimes need.

        Args:
            rows: the trajectory's steps.
            sources: for each step ``(j, "sample")`` or ``(j, "kept")`` for each of its row's history: the sample that
                went into step ``j``, or what it kept.
        Raises: ValueError if a step reads what no earlier step left, or thresholds at another quantile than the rest.
        """
        op = "DeviceTable"
        if not rows or len(rows) != len(sources):
            _check.fail(op, "sources", f"have an entry for each of the {len(rows)} (at least 1) rows", len(sources))
        last: dict[tuple[int, str], int] = {}
        for i, (row, keys) in enumerate(zip(rows, sources, strict=True)):
            if len(keys) != len(row.history) or len(keys) > MAX_HISTORY:
                _check.fail(op, f"sources[{i}]", f"name the row's {len(row.history)} (at most 4) tensors", keys)
            for j, kind in keys:
                known = kind == "sample" or (kind == "kept" and 0 <= j < i and rows[j].keep is not None)
                if not (0 <= j < i and known):
                    _check.fail(op, f"sources[{i}]", "name samples and kept tensors of earlier steps", keys)
                last[j, kind] = i
        clamped = {row.quantile for row in rows if row.needs_clean(row.keep is not None)}
        if len(clamped) > 1:
            _check.fail(op, "rows", "threshold at one quantile, or none of them", sorted(clamped))
        samples, kept, slots = _Ring(), _Ring(), []
        x = samples.take((0, "sample"))
        for i, keys in enumerate(sources):
            samples.free(lambda key, i=i: last.get(key, key[0]) < i)
            kept.free(lambda key, i=i: last[key] < i)
            history = [-1 - samples.held[key] if key[1] == "sample" else kept.held[key] for key in map(tuple, keys)]
            if last.get((i, "sample"), -1) <= i:  # written over: every element is read before it is written
                del samples.held[i, "sample"]
                y = samples.take((i + 1, "sample"), x)
            else:
                y = samples.take((i + 1, "sample"))
            into = kept.take((i, "kept")) if (i, "kept") in last else -1
            slots.append([x, y, into, 0, *history, *[0] * (MAX_HISTORY - len(history))])
            x = y
        padding = [[0.0] * (MAX_HISTORY - len(row.history)) for row in rows]
        numbers = [[*row.numbers(), *zeros, len(row.history)] for row, zeros in zip(rows, padding, strict=True)]
        return cls(
            rows=torch.tensor(numbers, dtype=torch.float32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            sample_slots=samples.size,
            kept_slots=kept.size,
            last=x,
            noisy=any(row.noise != 0 for row in rows),
            quantile=max(clamped, default=0.0),
        )

    def ring_buffers(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(samples ``[S, *shape]``, kept ``[K, *shape]``), float32: the memory of a trajectory of this shape."""
        sizes, device = (self.sample_slots, self.kept_slots), self.rows.device
        return tuple(torch.zeros(size, *shape, device=device) for size in sizes)


class _Ring:
    """Slots by what they hold."""

    def __init__(self):
        self.held: dict[tuple[int, str], int] = {}
        self.size = 0

    def take(self, key: tuple[int, str], slot: int | None = None) -> int:
        if slot is None:
            slot = min(set(range(self.size + 1)) - set(self.held.values()))
        self.held[key], self.size = slot, max(self.size, slot + 1)
        return slot

    def free(self, over) -> None:
        self.held = {key: slot for key, slot in self.held.items() if not over(key)}


@define(
    "solver_step_at(Tensor step, Tensor rows, Tensor slots, Tensor(a!) samples, Tensor(b!) kept, Tensor model_output, "
    "Tensor? uncond_output, Tensor? ids, Tensor? limits, float guidance, int seed, int stream, int copies, "
    "Tensor(c!)? input, Tensor(d!)? image) -> ()",
    fake=lambda *_: None,
)
def _impl(*arguments):
    step = SolverTableStep(*arguments)
    _check.ids("solver_step_at", step.ids)
    registry.resolve("solver_step_at", Call(step.samples.device.type, step.samples.dtype))(step)


def solver_step_at(
    table: DeviceTable,
    step: Tensor,
    samples: Tensor,
    kept: Tensor,
    model_output: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    ids: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
    input: Tensor | None = None,
    copies: int = 1,
    image: Tensor | None = None,
) -> None:
    """:func:`solver_step` by row ``step`` of ``table``, from its slots of the ring buffers into its slots of them.

    Nothing is read back and, but for dynamic thresholding, nothing allocated, so a capture of the call repeats for
    every step. The caller counts: ``step.add_(1)`` after each call.

    Args:
        step: ``[1]`` int64 on the device, in [0, T). A CUDA kernel leaves everything as it is beyond that.
        samples, kept: the rings of :meth:`DeviceTable.ring_buffers`, ``[slots, B, C, H, W]``.
        model_output, uncond_output, guidance_scale, ids, seed: as for :func:`solver_step`; outputs contiguous or
            channels_last.
        stream: of step 0; step ``i`` draws from ``stream + i``.
        input: the network's next input, float32, bfloat16 or float16 ``[copies * B, C, H, W]`` channels_last, or None.
        image: uint8 ``[B, H, W, C]`` for the bytes of the next sample, or None.
    Raises: TypeError or ValueError naming the argument.
    """
    op = "solver_step_at"
    _check.tensor(op, "step", step, dtypes=(torch.int64,))
    _check.tensor(op, "samples", samples, ndim=5, dtypes=(torch.float32,))
    _check.tensor(op, "kept", kept, ndim=5, dtypes=(torch.float32,))
    shape, device = samples.shape[1:], samples.device
    if step.numel() != 1 or step.device != device or table.rows.device != device:
        _check.fail(op, "step", f"be [1] on {device}, as the table", step)
    for name, ring, size in (("samples", samples, table.sample_slots), ("kept", kept, table.kept_slots)):
        if len(ring) < size or ring.shape[1:] != shape or ring.device != device or not ring.is_contiguous():
            _check.fail(op, name, f"be contiguous {[size, *shape]} on {device}", ring)
    outputs = {"model_output": model_output}
    if uncond_output is not None:
        outputs["uncond_output"] = uncond_output
    for name, value in outputs.items():
        _check.tensor(op, name, value, dtypes=_check.COMPILED)
        if value.shape != shape or value.device != device or value.dtype != model_output.dtype:
            _check.fail(op, name, f"be {list(shape)} on {device}, of one dtype", value)
    if table.noisy:
        if ids is None:
            _check.fail(op, "ids", "be given for a table with noise", ids, TypeError)
        _check.operand(op, "ids", ids, shape[:1], like=samples, dtypes=(torch.int64,))
    seed = _check.integer(op, "seed", seed, 0, 2**63)
    stream = _check.integer(op, "stream", stream, 0, 2**32 - len(table.rows))
    copies = _check.integer(op, "copies", copies, 1, 3)
    batch, channels, height, width = shape
    if input is not None:
        _check.tensor(op, "input", input, ndim=4, dtypes=_check.COMPILED)
        expected = (copies * batch, channels, height, width)
        last = input.is_contiguous(memory_format=torch.channels_last)
        if input.shape != expected or input.device != device or not last:
            _check.fail(op, "input", f"be {list(expected)} channels_last on {device}", input)
    if image is not None:
        _check.operand(op, "image", image, (batch, height, width, channels), like=samples, dtypes=(torch.uint8,))
    ids = ids if table.noisy else None
    limits = _limits(table, step, samples, model_output, uncond_output, guidance_scale)
    inputs = (samples, kept, model_output, uncond_output, ids, limits)
    options = (float(guidance_scale), seed, stream, copies)
    torch.ops.kr_fast.solver_step_at(step, table.rows, table.slots, *inputs, *options, input, image)


def _limits(table, step, samples, model_output, uncond_output, guidance) -> Tensor | None:
    """``[B]`` limits of dynamic thresholding: the row's numbers stay on the device."""
    if not table.quantile:
        return None
    at = step.view(1)
    x0_sample, x0_model, clip = table.rows.index_select(0, at)[0, :3]
    x = samples.index_select(0, table.slots.index_select(0, at)[0, :1])[0]
    return limits_of(table.quantile, x0_sample, x0_model, clip, x, model_output, uncond_output, guidance)
