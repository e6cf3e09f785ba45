"""Kernels of the family ``sampling`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.native import address


@registry.kernel("philox_normal", "cuda", refuses=native.cuda_tensors(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    with native.on(ids):
        native.cuda.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), native.stream(ids))
    return out


@registry.kernel("solver_step", "cuda", refuses=native.cuda_tensors(torch.float32))
def solver_step(
    sample, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies, out
) -> None:
    _solver_step(
        sample, sample.data_ptr(), model_output, uncond_output, ids, limits, [h.data_ptr() for h in history], row,
        guidance, seed, stream, copies, *out, (0,) * 6,
    )  # fmt: skip


@registry.kernel("solver_step_at", "cuda", refuses=native.cuda_tensors(torch.float32))
def solver_step_at(
    step, rows, slots, samples, kept, model_output, uncond_output, ids, limits, guidance, seed, stream, copies,
    input, image,
) -> None:  # fmt: skip
    table = (step.data_ptr(), len(rows), rows.data_ptr(), slots.data_ptr(), samples.data_ptr(), kept.data_ptr())
    _solver_step(
        samples[0], 0, model_output, uncond_output, ids, limits, [], [], guidance, seed, stream, copies,
        None, None, input, image, table,
    )  # fmt: skip


def _solver_step(
    like, x, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies,
    y, kept, input, image, table,
) -> None:  # fmt: skip
    """``like`` has the sample's shape and device, ``x`` is its address."""
    batch = len(like)
    channels = like.shape[1] if like.ndim == 4 else 1
    last = model_output.ndim == 4 and not model_output.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    model_output = model_output.contiguous(memory_format=layout)
    uncond_output = None if uncond_output is None else uncond_output.contiguous(memory_format=layout)
    with native.on(like):
        native.cuda.solver_step(
            x, model_output.data_ptr(), address(uncond_output), codes.DTYPES[model_output.dtype], last,
            address(ids), address(limits), history, row, guidance, seed, stream,
            batch, channels, like.numel() // max(batch * channels, 1), address(y), address(kept),
            address(input), 0 if input is None else codes.DTYPES[input.dtype], copies, address(image),
            *table, native.stream(like),
        )  # fmt: skip


@registry.kernel("pack_uint8", "cuda", refuses=native.cuda_tensors(*codes.DTYPES))
def pack_uint8(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    with native.on(x):
        native.cuda.pack_uint8(
            x.data_ptr(), codes.DTYPES[x.dtype], batch, channels, height * width, last, out.data_ptr(), native.stream(x)
        )
    return out
