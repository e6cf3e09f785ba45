"""Kernels of ``kr_fast._cuda`` (CUDA C++). As :mod:`.cpu`, with the current CUDA stream as one more argument."""

import contextlib

import torch
from torch import Tensor

from kr_fast.backends import registry

try:
    from kr_fast import _cuda
except ImportError as error:
    _cuda = None
    registry.mark_unavailable(
        "cuda", f"kr_fast._cuda cannot be loaded ({error}); install kr-fast where nvcc is found, see KR_FAST_CUDA"
    )


DEVICE = "cuda"  # the device type of the tensors that the module takes; tests load one that runs on the CPU
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbers of kr::Dtype


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def accepts(*dtypes: torch.dtype):
    """A predicate: tensors of one of ``dtypes`` on an NVIDIA GPU."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if torch.version.hip is not None:
            return "CUDA C++ kernels need an NVIDIA GPU, got ROCm"
        if device != DEVICE:
            return f"tensors must be on {DEVICE}, got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def queue(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as an address."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


@registry.kernel("philox_normal", "cuda", refuses=accepts(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    with on(ids):
        _cuda.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), queue(ids))
    return out


@registry.kernel("solver_step", "cuda", refuses=accepts(torch.float32))
def solver_step(
    sample, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies, out
) -> None:
    _solver_step(
        sample, sample.data_ptr(), model_output, uncond_output, ids, limits, [h.data_ptr() for h in history], row,
        guidance, seed, stream, copies, *out, (0,) * 6,
    )  # fmt: skip


@registry.kernel("solver_step_at", "cuda", refuses=accepts(torch.float32))
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
    with on(like):
        _cuda.solver_step(
            x, model_output.data_ptr(), _address(uncond_output), DTYPES[model_output.dtype], last,
            _address(ids), _address(limits), history, row, guidance, seed, stream,
            batch, channels, like.numel() // max(batch * channels, 1), _address(y), _address(kept),
            _address(input), 0 if input is None else DTYPES[input.dtype], copies, _address(image),
            *table, queue(like),
        )  # fmt: skip


@registry.kernel("pack_uint8", "cuda", refuses=accepts(*DTYPES))
def pack_uint8(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    with on(x):
        _cuda.pack_uint8(x.data_ptr(), DTYPES[x.dtype], batch, channels, height * width, last, out.data_ptr(), queue(x))
    return out


@registry.kernel("group_norm_silu", "cuda", refuses=accepts(*DTYPES))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu) -> Tensor:
    batch, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    shape = (batch, channels + more, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    affine = weight if bias is None else bias
    with on(x):
        _cuda.group_norm_silu(
            x.data_ptr(), _address(skip), batch, height * width, channels, more, DTYPES[x.dtype],
            _address(weight), _address(bias), 0 if affine is None else DTYPES[affine.dtype],
            _address(shift), 0 if shift is None else DTYPES[shift.dtype], 0 if shift is None else shift.stride(0),
            groups, eps, silu, y.data_ptr(), queue(x),
        )  # fmt: skip
    return y
