"""One step of any linear diffusion solver, in one pass: guidance, clamp, history, noise, the sum and what follows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import SolverOutput, SolverRow, SolverStep
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import any_requires_grad, define, is_plain, mark_written

MAX_HISTORY = 4
EMITS = SolverOutput._fields


_ARGUMENTS = (
    "Tensor sample, Tensor model_output, Tensor? uncond_output, Tensor? ids, Tensor? limits, Tensor[] history, "
    "float[] row, float guidance, int seed, int stream, int copies"
)
_OUT = "Tensor(a!)? y, Tensor(b!)? kept, Tensor(c!)? input, Tensor(d!)? image"


def _allocate(sample: Tensor, emit: Sequence[str], dtype: torch.dtype, copies: int) -> list[Tensor]:
    batch, *rest = sample.shape
    outputs = []
    for name in emit:
        if name == "input":
            value = sample.new_empty((copies * batch, *rest), dtype=dtype)
            outputs.append(value.contiguous(memory_format=torch.channels_last))
        elif name == "image":
            outputs.append(sample.new_empty((batch, *rest[1:], rest[0]), dtype=torch.uint8))
        else:
            outputs.append(torch.empty_like(sample))
    return outputs


def _named(emit: Sequence[str], tensors: Sequence[Tensor]) -> SolverOutput:
    return SolverOutput(**dict(zip(emit, tensors, strict=True)))


def _run(step: SolverStep) -> None:
    _check.ids("solver_step", step.ids)
    registry.resolve("solver_step", Call(step.sample.device.type, step.sample.dtype))(step)


def _fake(sample, *arguments):
    *_, copies, emit, dtype = arguments
    return _allocate(sample, emit, dtype, copies)


@define(f"solver_step({_ARGUMENTS}, str[] emit, ScalarType dtype) -> Tensor[]", fake=_fake)
def _new(*arguments):
    *most, emit, dtype = arguments
    outputs = _allocate(most[0], emit, dtype, most[-1])
    _run(_step(most, _named(emit, outputs)))
    return outputs


@define(f"solver_step_out({_ARGUMENTS}, {_OUT}) -> ()", fake=lambda *_: None)
def _into(*arguments):
    _run(_step(arguments[:-4], SolverOutput(*arguments[-4:])))


def _step(arguments: Sequence, out: SolverOutput) -> SolverStep:
    """From the arguments of the schema."""
    step = SolverStep(*arguments, out)
    return step._replace(row=SolverRow.of_numbers(step.row))


def solver_step(
    sample: Tensor,
    model_output: Tensor,
    row: SolverRow,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    history: tuple[Tensor, ...] = (),
    ids: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
    emit: tuple[str, ...] = ("sample",),
    input_dtype: torch.dtype = torch.float32,
    copies: int = 1,
    out: SolverOutput | None = None,
) -> Tensor | SolverOutput:
    """The next sample of a linear solver, and what follows from it, in one read of the inputs.

    ``e = u + g (m - u)`` with guidance (``u`` = ``uncond_output``, ``g`` = ``guidance_scale``), else ``e = m``;
    ``p = clamp(row.x0_sample x + row.x0_model e, -row.clip, row.clip)``;
    ``y = row.sample x + row.model e + row.x0 p + sum_k row.history[k] h_k + row.noise N(id, stream)``.
    With ``row.quantile`` above 0 the clamp is dynamic thresholding: ``s`` = that quantile of an image's ``|p|``,
    limited to ``[1, row.clip]``, and ``p = clamp(p, -s, s) / s``.
    Every product-sum is one fused multiply-add in this order, so CPU and CUDA give the same bits.

    Args:
        sample: ``x``, ``[B, C, H, W]`` float32 contiguous (float64 on the reference backend).
        model_output: ``m``, of ``sample``'s shape and any strides; its dtype, or bfloat16 or float16.
        row: coefficients, usually from a :class:`kr_fast.synthesis.StepTable`.
        uncond_output: ``u``, like ``model_output``, or None without guidance.
        history: at most 4 earlier tensors like ``sample`` (multistep solvers).
        ids: ``[B]`` int64 image ids; needed where ``row.noise`` is not 0.
        seed, stream: of the noise, as in :func:`kr_fast.philox_normal`.
        emit: what to return: ``"sample"`` (``y``), ``"kept"`` (``row.keep`` times ``x, e, p``: a later step's history),
            ``"input"`` (``row.next_input y`` as ``input_dtype``, channels_last: the network's next input, ``copies``
            times along the batch), ``"image"`` (bytes of ``y`` as :func:`kr_fast.pack_uint8` makes them,
            ``[B, H, W, C]``).
        out: tensors to write into instead of new ones; it then decides what is emitted. ``out.sample`` may be
            ``sample``; the others are contiguous (``input`` channels_last) and overlap nothing.
    Returns: ``y`` if nothing else is emitted, else a :class:`SolverOutput`.
    Raises: TypeError or ValueError naming the argument. There is no derivative: backward through the result raises.
    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6; Saharia et al., "Photorealistic
        Text-to-Image Diffusion Models", 2022, section 2.3 (thresholding); the linear form of a scheduler's step is
        read off its own code by ``StepTable``.
    """
    op = "solver_step"
    _check.tensor(op, "sample", sample, dtypes=(torch.float32, torch.float64))
    if sample.ndim < 2 or not sample.is_contiguous():
        _check.fail(op, "sample", "be contiguous [B, ...]", sample)
    outputs = {"model_output": model_output}
    if uncond_output is not None:
        outputs["uncond_output"] = uncond_output
    allowed = _check.COMPILED if sample.dtype == torch.float32 else (sample.dtype,)
    for name, value in outputs.items():
        _check.tensor(op, name, value, dtypes=allowed)
    earlier = {f"history[{k}]": h for k, h in enumerate(history)}
    for name, value in {**outputs, **earlier}.items():
        if value.shape != sample.shape or value.device != sample.device:
            _check.fail(op, name, f"be like sample ({_check.describe(sample)})", value)
    if uncond_output is not None and uncond_output.dtype != model_output.dtype:
        _check.fail(op, "uncond_output", f"have model_output's dtype ({model_output.dtype})", uncond_output)
    for name, value in earlier.items():
        _check.tensor(op, name, value, dtypes=(sample.dtype,))
    if len(history) != len(row.history) or len(history) > MAX_HISTORY:
        _check.fail(op, "history", f"hold the row's {len(row.history)} (at most {MAX_HISTORY}) tensors", len(history))
    if row.noise == 0:
        ids = None
    else:
        if ids is None:
            _check.fail(op, "ids", "be given for a step with noise", ids, TypeError)
        ids = _check.integers(op, "ids", ids)
        if ids.shape != sample.shape[:1] or ids.device != sample.device:
            _check.fail(op, "ids", f"be [{len(sample)}] on {sample.device}", ids)
    seed = _check.integer(op, "seed", seed, 0, 2**63)
    stream = _check.integer(op, "stream", stream, 0, 2**32)
    copies = _check.integer(op, "copies", copies, 1, 3)
    if out is not None:
        emit = tuple(name for name, value in zip(EMITS, out, strict=True) if value is not None)
        input_dtype = input_dtype if out.input is None else out.input.dtype
    _check_emit(op, sample, row, emit, input_dtype)
    inputs = (sample, model_output, uncond_output, ids)
    inputs += (_limits(row, sample, model_output, uncond_output, guidance_scale), [h.contiguous() for h in history])
    options = (float(guidance_scale), seed, stream, copies)
    direct, into = _past_the_dispatcher(sample, *outputs.values(), *history), out
    if out is not None:
        _check_out(op, sample, out, emit, input_dtype, copies)
        if torch.is_grad_enabled():
            _check.no_grad(op, **{f"out.{name}": getattr(out, name) for name in emit})
    elif direct:
        into = _named(emit, _allocate(sample, emit, input_dtype, copies))
    else:
        into = _named(emit, torch.ops.kr_fast.solver_step(*inputs, row.numbers(), *options, list(emit), input_dtype))
    if direct:
        _run(SolverStep(*inputs, row, *options, into))
    elif out is not None:
        torch.ops.kr_fast.solver_step_out(*inputs, row.numbers(), *options, *out)
    if out is None:
        return into.sample if tuple(emit) == ("sample",) else into
    if direct:  # the dispatcher has done it elsewhere
        mark_written(*out)
    return out


def _past_the_dispatcher(*tensors: Tensor) -> bool:
    """Whether the kernel may be called as it is: the dispatcher costs more than a small batch's kernel."""
    if torch.compiler.is_compiling():
        return False
    _check.past_dispatcher("solver_step")
    return is_plain(*tensors) and not (torch.is_grad_enabled() and any_requires_grad(*tensors))


def _check_out(op: str, sample: Tensor, out: SolverOutput, emit: tuple[str, ...], dtype: torch.dtype, copies: int):
    shape, rest = sample.shape, sample.shape[2:]
    for name in emit:
        value = getattr(out, name)
        expected, expected_dtype, layout = shape, sample.dtype, torch.contiguous_format
        if name == "input":
            expected, expected_dtype, layout = (copies * shape[0], *shape[1:]), dtype, torch.channels_last
        elif name == "image":
            expected, expected_dtype = (shape[0], *rest, shape[1]), torch.uint8
        alike = value.shape == expected and value.dtype == expected_dtype and value.device == sample.device
        if not alike or not value.is_contiguous(memory_format=layout):
            kind = str(expected_dtype).removeprefix("torch.")
            rule = f"be {kind} {list(expected)} on {sample.device}, {_LAYOUTS[layout]}"
            _check.fail(op, f"out.{name}", rule, value)


_LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}


def _check_emit(op: str, sample: Tensor, row: SolverRow, emit: tuple[str, ...], dtype: torch.dtype):
    if not emit or len(set(emit)) != len(emit) or not set(emit) <= set(EMITS):
        _check.fail(op, "emit", f"name some of {', '.join(EMITS)}, each once", emit)
    if "kept" in emit and row.keep is None:
        _check.fail(op, "row", "have keep where kept is emitted", row.keep)
    if ("input" in emit or "image" in emit) and (sample.ndim != 4 or sample.dtype != torch.float32):
        _check.fail(op, "sample", "be float32 [B, C, H, W] where input or image is emitted", sample)
    if dtype not in _check.COMPILED:
        _check.fail(op, "input_dtype", "be float32, bfloat16 or float16", dtype)


def _limits(row: SolverRow, sample: Tensor, m: Tensor, u: Tensor | None, guidance: float) -> Tensor | None:
    """``[B]`` limits of dynamic thresholding."""
    if not row.quantile:
        return None
    if not 0 < row.quantile <= 1 or not math.isfinite(row.clip):
        _check.fail("solver_step", "row", "have quantile in (0, 1] and a finite clip", (row.quantile, row.clip))
    return limits_of(row.quantile, row.x0_sample, row.x0_model, row.clip, sample, m, u, guidance)


def limits_of(quantile: float, x0_sample, x0_model, clip, sample: Tensor, m: Tensor, u: Tensor | None, guidance: float):
    """``[B]`` limits of dynamic thresholding; coefficients are floats, or tensors on the device."""
    e = m.to(sample.dtype) if u is None else u.to(sample.dtype) + guidance * (m.to(sample.dtype) - u.to(sample.dtype))
    clean = (x0_sample * sample + x0_model * e).flatten(1).abs()
    # torch.quantile refuses long rows and sorts; two order statistics give its linear interpolation.
    position = quantile * (clean.shape[1] - 1)
    low = int(position)
    first = clean.kthvalue(low + 1, dim=1).values
    second = clean.kthvalue(min(low + 2, clean.shape[1]), dim=1).values
    return torch.lerp(first, second, position - low).clamp(min=1.0).clamp(max=clip)
