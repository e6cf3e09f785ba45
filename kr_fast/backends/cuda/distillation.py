"""Kernels of the family ``distillation`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.backends.native import address

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device, stream: int) -> Tensor:
    """Sums of blocks, and a counter that every launch finds at 0 and leaves at 0.

    Launches of one stream follow each other, so they share one. A CUDA graph may run beside the stream that captured
    it: it gets one of its own, which its replays set to 0.
    """

    def fresh() -> Tensor:
        return torch.zeros(2 * native.cuda.distillation_loss_blocks + 1, dtype=torch.float32, device=device)

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return fresh()
    key = device, stream
    if key not in _workspaces:
        _workspaces[key] = fresh()
    return _workspaces[key]


def _loss(
    input, target, indices, labels, weight,
    temperature, target_type, divergence, alpha, beta, soft, hard, smoothing, ignore_index, reduction,
    *, forward, row_loss=None, loss=None, scale, stats=None, grad=None, upstream=None, unless_one=False,
) -> None:  # fmt: skip
    """One launch, which writes ``loss`` or ``row_loss``, ``scale`` and ``stats``, or ``grad``, or all of them."""
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    with native.on(input):
        stream = native.stream(input)
        # Only a launch that adds rows up needs it.
        partial = _workspace(input.device, stream).data_ptr() if forward and row_loss is None else 0
        native.cuda.distillation_loss(
            forward, address(row_loss), address(loss), address(scale), address(stats), address(grad),
            partial, partial + 8 * native.cuda.distillation_loss_blocks, address(upstream),
            upstream.stride(0) if upstream is not None and upstream.ndim else 0, unless_one, reduction == "mean",
            input.data_ptr(), target.data_ptr(), codes.DTYPES[input.dtype], codes.DTYPES[target.dtype], rows, classes,
            input.stride(0), target.stride(0), address(labels), address(weight),
            temperature, soft, hard, smoothing, ignore_index, codes.TARGET_KINDS[target_type], address(indices),
            target.shape[1], target_type == "topk_smooth", codes.DIVERGENCES[divergence], alpha, beta, stream,
        )  # fmt: skip


def _loss_forward(input, target, indices, labels, weight, *parameters):
    """(loss, row statistics, factor of the gradients), float32, in one launch."""
    loss, row_loss = None, None
    if parameters[-1] == "none":
        out = row_loss = torch.empty(len(input), dtype=torch.float32, device=input.device)
    else:
        out = loss = torch.empty((), dtype=torch.float32, device=input.device)
    stats, scale = out.new_empty(len(input), codes.LOSS_STATISTICS), out.new_empty(())
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=True, row_loss=row_loss, loss=loss, scale=scale, stats=stats,
    )  # fmt: skip
    return out, stats, scale


def _loss_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters) -> Tensor:
    """d loss / d input, of input's dtype, contiguous."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=False, scale=scale, stats=stats, grad=grad, upstream=upstream.float(),
    )  # fmt: skip
    return grad


def _loss_both(input, target, indices, labels, weight, *parameters) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, factor): the logits are read once."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    loss = torch.empty((), dtype=torch.float32, device=input.device)
    scale = torch.empty_like(loss)
    _loss(input, target, indices, labels, weight, *parameters, forward=True, loss=loss, scale=scale, grad=grad)
    return loss, grad, scale


def _loss_amend(grad, upstream, input, target, indices, labels, weight, scale, *parameters) -> None:
    """The gradient once more into ``grad``, unless the device finds that the upstream gradient is 1."""
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=False, scale=scale, grad=grad, upstream=upstream.float(), unless_one=True,
    )  # fmt: skip


def _refuses_loss(call: ClassesCall) -> str | None:
    if call.classes >= 2**28:
        return f"the class count must be below 2^28, got {call.classes}"
    return native.cuda_tensors(*codes.DTYPES)(call)


registry.differentiable(
    "distillation_loss",
    "cuda",
    registry.Differentiable(_loss_forward, _loss_backward, _loss_both, _loss_amend),
    refuses=_refuses_loss,
)
