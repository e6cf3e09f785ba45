"""One step of any linear diffusion solver, in one pass: guidance, clamp, history, noise and the sum."""

from typing import NamedTuple

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.ops import _check
from kr_fast.ops._library import define

MAX_HISTORY = 4


class SolverRow(NamedTuple):
    """The coefficients of one step; see :func:`solver_step` for the formula."""

    x0_sample: float = 0.0
    x0_model: float = 0.0
    clip: float = float("inf")
    sample: float = 0.0
    model: float = 0.0
    x0: float = 0.0
    noise: float = 0.0
    next_input: float = 1.0
    history: tuple[float, ...] = ()


def _fake(sample, model_output, uncond_output, ids, history, row, guidance, seed, stream):
    return torch.empty_like(sample)


@define(
    "solver_step(Tensor sample, Tensor model_output, Tensor? uncond_output, Tensor? ids, Tensor[] history, "
    "float[] row, float guidance, int seed, int stream) -> Tensor",
    fake=_fake,
)
def _impl(sample, model_output, uncond_output, ids, history, row, guidance, seed, stream):
    run = registry.resolve("solver_step", sample.device.type, sample.dtype)
    return run(sample, model_output, uncond_output, ids, history, row, guidance=guidance, seed=seed, stream=stream)


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
) -> Tensor:
    """The next sample of a linear solver.

    ``e = u + g (m - u)`` with guidance (``u`` = ``uncond_output``, ``g`` = ``guidance_scale``), else ``e = m``;
    ``p = clamp(row.x0_sample x + row.x0_model e, -row.clip, row.clip)``;
    ``y = row.sample x + row.model e + row.x0 p + sum_k row.history[k] h_k + row.noise N(id, stream)``.
    Every product-sum is one fused multiply-add in this order, so CPU and CUDA give the same bits.

    Args:
        sample: ``x``, ``[B, C, H, W]`` float32 contiguous (float64 on the reference backend).
        model_output: ``m``, like ``sample``.
        row: coefficients, usually from a :class:`kr_fast.synthesis.StepTable`.
        uncond_output: ``u``, like ``sample``, or None without guidance.
        history: at most 4 earlier tensors like ``sample`` (multistep solvers).
        ids: ``[B]`` int64 image ids; needed where ``row.noise`` is not 0.
        seed, stream: of the noise, as in :func:`kr_fast.philox_normal`.
    Returns: ``y``, like ``sample``.
    Raises: TypeError or ValueError naming the argument.
    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6; the linear form of a scheduler's step
        is read off its own code by ``StepTable``.
    """
    op = "solver_step"
    _check.tensor(op, "sample", sample, dtypes=(torch.float32, torch.float64))
    if sample.ndim < 2 or not sample.is_contiguous():
        _check.fail(op, "sample", "be contiguous [B, ...]", sample)
    others = [("model_output", model_output), *((f"history[{k}]", h) for k, h in enumerate(history))]
    if uncond_output is not None:
        others.append(("uncond_output", uncond_output))
    for name, value in others:
        _check.tensor(op, name, value, dtypes=(sample.dtype,))
        if value.shape != sample.shape or value.device != sample.device:
            _check.fail(op, name, f"be like sample ({_check.describe(sample)})", value)
    if len(history) != len(row.history) or len(history) > MAX_HISTORY:
        _check.fail(op, "history", f"hold the row's {len(row.history)} (at most {MAX_HISTORY}) tensors", len(history))
    if row.noise != 0:
        if ids is None:
            _check.fail(op, "ids", "be given for a step with noise", ids, TypeError)
        _check.tensor(op, "ids", ids, ndim=1, dtypes=(torch.int64,))
        if len(ids) != len(sample) or ids.device != sample.device:
            _check.fail(op, "ids", f"be [{len(sample)}] on {sample.device}", ids)
        ids = ids.contiguous()
    _check.integer(op, "seed", seed, 0, 2**63)
    _check.integer(op, "stream", stream, 0, 2**32)
    model_output = model_output.contiguous()
    uncond_output = None if uncond_output is None else uncond_output.contiguous()
    history = [h.contiguous() for h in history]
    flat = [*row[:8], *row.history]
    noise_ids = ids if row.noise != 0 else None
    return torch.ops.kr_fast.solver_step(
        sample, model_output, uncond_output, noise_ids, history, flat, float(guidance_scale), seed, stream
    )
