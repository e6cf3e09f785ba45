"""The distillation loss in torch.library and in autograd, where the gradient may come with the loss."""

import torch
from torch import Tensor

from kr_fast.backends import codes, registry
from kr_fast.backends.arguments import LossOptions
from kr_fast.backends.calls import ClassesCall
from kr_fast.backends.registry import Differentiable
from kr_fast.ops._library import define, is_plain, save, saved
from kr_fast.ops.distillation import reference
from kr_fast.ops.distillation.checks import loss_dtype

# target: [N, C], or [N, k] probabilities of the classes in indices with target_type "topk_smooth" or "topk_renorm".
_TENSORS = "Tensor input, Tensor target, Tensor? indices, Tensor? labels, Tensor? weight"
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in LossOptions.__annotations__.items())


def _kernels(input: Tensor) -> Differentiable:
    return registry.resolve("distillation_loss", ClassesCall(input.device.type, input.dtype, input.shape[1]))


# ---------------------------------------------------------------- torch.library, whose schema has no LossOptions


def _forward_fake(input, target, indices, labels, weight, *options):
    rows = input.shape[0]
    loss = input.new_empty((rows,) if LossOptions(*options).reduction == "none" else (), dtype=loss_dtype(input))
    return loss, loss.new_empty((rows if input.is_cuda else 0, codes.LOSS_STATISTICS)), loss.new_empty(())


def _setup_context(ctx, inputs, output):
    ctx.options = LossOptions(*inputs[5:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:5], *output[1:])


def _registered_backward(ctx, upstream, *_):
    grad = None if upstream is None else _gradient(_DISPATCHED, ctx, upstream)
    return grad, *[None] * (4 + len(ctx.options))


@define(
    f"distillation_loss_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    backward=_registered_backward,
    setup_context=_setup_context,
)
def _forward(input, target, indices, labels, weight, *options):
    return _kernels(input).forward(input, target, indices, labels, weight, LossOptions(*options))


def _backward_fake(upstream, input, *arguments):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@define(
    f"distillation_loss_backward(Tensor upstream, {_TENSORS}, Tensor stats, Tensor scale, {_OPTIONS}) -> Tensor",
    fake=_backward_fake,
)
def _backward(upstream, input, target, indices, labels, weight, stats, scale, *options):
    tensors = upstream, input, target, indices, labels, weight, stats, scale
    return _kernels(input).backward(*tensors, LossOptions(*options))


def _dispatched_forward(*arguments):
    *tensors, options = arguments
    return torch.ops.kr_fast.distillation_loss_forward(*tensors, *options)


def _dispatched_backward(*arguments):
    *tensors, options = arguments
    return torch.ops.kr_fast.distillation_loss_backward(*tensors, *options)


_DISPATCHED = Differentiable(_dispatched_forward, _dispatched_backward)  # for traced and wrapped tensors


# ---------------------------------------------------------------- autograd

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of the vmap of torch.autograd.grad


def _wants_formula(upstream: Tensor) -> bool:
    """Whether backward is itself differentiated (create_graph), or runs for many upstream gradients at once (vmap)."""
    return torch.is_grad_enabled() or _is_batched(upstream)


def _gradient(kernels: Differentiable, ctx, upstream: Tensor) -> Tensor:
    *tensors, stats, scale = saved(ctx)
    if _wants_formula(upstream):
        return reference.derivative(upstream, *tensors, ctx.options)
    return kernels.backward(upstream, *tensors, stats, scale, ctx.options)


class _TwoPass(torch.autograd.Function):
    """Forward, then backward, which recomputes from the logits with the upstream gradient folded in in float32."""

    @staticmethod
    def forward(ctx, kernels, input, target, indices, labels, weight, options):
        loss, stats, scale = kernels.forward(input, target, indices, labels, weight, options)
        save(ctx, input, target, indices, labels, weight, stats, scale)
        ctx.kernels, ctx.options = kernels, options
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return None, _gradient(ctx.kernels, ctx, upstream), None, None, None, None, None


class _FusedForward(torch.autograd.Function):
    """Loss and gradient in one pass; backward hands the gradient over where the upstream gradient is 1.

    Not for float16: its gradient would underflow before a loss scale arrives. ``call`` is (kernels, target, indices,
    labels, weight, options): one argument, because each costs time, and only ``input`` has a gradient.
    """

    @staticmethod
    def forward(ctx, input, call):
        kernels, *tensors, options = call
        loss, ctx.grad, ctx.scale = kernels.forward_backward(input, *tensors, options)
        save(ctx, input, *tensors)
        ctx.kernels, ctx.options = kernels, options
        return loss

    @staticmethod
    def backward(ctx, upstream):
        tensors = saved(ctx)  # also refuses logits that were changed in place since
        if _wants_formula(upstream):
            return reference.derivative(upstream, *tensors, ctx.options), None
        # Given away, not shared: autograd may then keep it as .grad without a copy, and add to it.
        grad, ctx.grad = ctx.grad, None
        if grad is not None and ctx.kernels.rescale_grad:
            ctx.kernels.rescale_grad(grad, upstream, *tensors, ctx.scale, ctx.options)
            return grad, None
        factor = 0 if grad is None else upstream.item()
        if grad is not None and factor != 1 and grad.dtype == torch.float32:
            grad.mul_(factor)
        elif grad is None or factor != 1:  # a second backward; or another rounding to bfloat16
            grad = ctx.kernels.backward(upstream, *tensors, None, ctx.scale, ctx.options)
        return grad, None


# Past Function.apply, which unwraps what torch.func has wrapped: the checks have refused that.
_fused_apply = super(torch.autograd.Function, _FusedForward).apply

LAUNCH_ELEMENTS = 2**22  # logits that take about as long to read twice more as a launch


def _fused_is_faster(input: Tensor, labels: Tensor | None, weight: Tensor | None, reduction: str) -> bool:
    """Whether fusing forward and backward is faster on a GPU.

    For a mean it must know the sum of the weights beforehand, which is a launch of its own where there are weights or
    labels: it pays where there is much to read.
    """
    weighted = reduction == "mean" and (labels is not None or weight is not None)
    return not weighted or input.numel() >= LAUNCH_ELEMENTS


def apply(
    input: Tensor,
    target: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """By the shortest way: the dispatcher costs more than a small batch's kernels, so plain tensors go past it."""
    if torch.compiler.is_compiling() or not is_plain(input, target):
        return _dispatched_forward(input, target, indices, labels, weight, options)[0]
    kernels = _kernels(input)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return kernels.forward(input, target, indices, labels, weight, options)[0]
    can_fuse = kernels.forward_backward and options.reduction != "none" and input.dtype != torch.float16
    if can_fuse and (not kernels.rescale_grad or _fused_is_faster(input, labels, weight, options.reduction)):
        return _fused_apply(input, (kernels, target, indices, labels, weight, options))
    return _TwoPass.apply(kernels, input, target, indices, labels, weight, options)


def apply_standardized(student: Tensor, teacher: Tensor, *tensors: Tensor | None) -> Tensor:
    """:func:`apply`, with the divergence of standardised logits; the hard term is of the logits as they are."""
    *others, options = tensors
    _, labels, weight = others
    z, t = student, teacher
    if labels is not None or weight is not None:
        # A row that does not count may hold anything, and 0 times the derivative of NaN is NaN.
        like = student.detach().to(loss_dtype(student))
        counts = reference.row_weight(like, labels, weight, options.ignore_index)[:, None] != 0
        z, t = torch.where(counts, student, 0), torch.where(counts, teacher, 0)
    loss = apply(_standardized(z), _standardized(t), *others, options.changed(hard_weight=0.0))
    if options.hard_weight:
        loss = loss + apply(student, teacher, *others, options.changed(divergence="kl", soft_weight=0.0))
    return loss


def _standardized(logits: Tensor) -> Tensor:
    """``(z - mean) / (std + 1e-7)`` by row, unbiased std; a constant row becomes 0, with a finite gradient."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    return centred / (variance.clamp_min(1e-30).sqrt() + 1e-7)


def loss_and_grad(input: Tensor, target: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """(loss, its gradient), without autograd; the arguments are those of :func:`apply`."""
    *tensors, options = input, target, *arguments
    plain = not torch.compiler.is_compiling() and is_plain(input, target)
    kernels = _kernels(input) if plain else _DISPATCHED
    if kernels.forward_backward:
        return kernels.forward_backward(*tensors, options)[:2]
    loss, stats, scale = kernels.forward(*tensors, options)
    return loss, kernels.backward(torch.ones_like(loss), *tensors, stats, scale, options)
