"""Kernels of the family ``distillation`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import LossOptions
from kr_fast.backends.calls import ClassesCall
from kr_fast.backends.native import address

WORKSPACES: dict[torch.device, Tensor] = {}


def workspace_of(device: torch.device, stream: int) -> Tensor:
    """Sums of blocks, and a counter that every launch finds at 0 and leaves at 0.

    Launches of the default stream follow each other, so they share one. On another stream each has one of its own,
    which lives as long as the call: a CUDA graph may run beside the stream that captured it, and sets it to 0 by
    itself, and the memory pool in which ``torch.compile(mode="reduce-overhead")`` warms a graph up may hold nothing
    afterwards but the graph's outputs, or torch raises.
    """
    kept = None if stream else WORKSPACES.get(device)
    if kept is not None:
        return kept
    fresh = torch.zeros(native.cuda.distillation_loss_workspace, dtype=torch.float32, device=device)
    return fresh if stream else WORKSPACES.setdefault(device, fresh)


def _loss(tensors, options: LossOptions, *, forward, scale, upstream=None, unless_one=False, **outputs) -> None:
    """One launch, which writes into ``outputs`` (row_loss, loss, stats, grad) and, if ``forward``, into ``scale``."""
    input, target, indices, labels, weight = tensors
    if target.dtype == torch.float64:
        target = target.float()
    call = structs.distillation_loss(input, target, indices, labels, weight, options)
    buffers = dict.fromkeys(("row_loss", "loss", "stats", "grad"), 0)
    buffers |= {name: address(output) for name, output in outputs.items()}
    buffers |= {"scale": address(scale), "upstream": address(upstream), "unless_one": unless_one}
    buffers["upstream_step"] = upstream.stride(0) if upstream is not None and upstream.ndim else 0
    with native.on(input):
        stream = native.stream(input)
        adds = forward and options.reduction != "none"
        workspace = workspace_of(input.device, stream) if adds else None  # held until the launch is in the stream
        buffers["workspace"] = address(workspace)
        native.cuda.distillation_loss(call, buffers, forward, stream)


def _loss_forward(input, target, indices, labels, weight, options):
    """(loss, row statistics, factor of the gradients), float32, in one launch."""
    by_row = options.reduction == "none"
    loss = torch.empty((len(input),) if by_row else (), dtype=torch.float32, device=input.device)
    stats, scale = loss.new_empty(len(input), codes.LOSS_STATISTICS), loss.new_empty(())
    outputs = {"row_loss" if by_row else "loss": loss, "stats": stats}
    _loss((input, target, indices, labels, weight), options, forward=True, scale=scale, **outputs)
    return loss, stats, scale


def _loss_backward(upstream, input, target, indices, labels, weight, stats, scale, options) -> Tensor:
    """d loss / d input, of input's dtype, contiguous."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    buffers = {"scale": scale, "stats": stats, "grad": grad, "upstream": upstream.float()}
    _loss((input, target, indices, labels, weight), options, forward=False, **buffers)
    return grad


def _loss_forward_backward(input, target, indices, labels, weight, options) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, factor): the logits are read once."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    loss = torch.empty((), dtype=torch.float32, device=input.device)
    scale = torch.empty_like(loss)
    _loss((input, target, indices, labels, weight), options, forward=True, loss=loss, scale=scale, grad=grad)
    return loss, grad, scale


def _loss_rescale_grad(grad, upstream, input, target, indices, labels, weight, scale, options) -> None:
    """The gradient once more into ``grad``, unless the device finds that the upstream gradient is 1."""
    buffers = {"scale": scale, "grad": grad, "upstream": upstream.float(), "unless_one": True}
    _loss((input, target, indices, labels, weight), options, forward=False, **buffers)


def _refuses_loss(call: ClassesCall) -> str | None:
    if call.classes >= 2**28:
        return f"the class count must be below 2^28, got {call.classes}"
    return native.cuda_tensors(*codes.DTYPES)(call)


registry.differentiable(
    "distillation_loss",
    "cuda",
    registry.Differentiable(_loss_forward, _loss_backward, _loss_forward_backward, _loss_rescale_grad),
    refuses=_refuses_loss,
)
