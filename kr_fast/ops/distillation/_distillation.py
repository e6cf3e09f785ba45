"""What the distillation losses share: the op in torch.library, autograd around it, and the checks of its arguments."""

import functools
import math
import numbers

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops import _check
from kr_fast.ops._library import define, is_plain, save, saved
from kr_fast.ops.distillation import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
STATS = 5  # a row's max and ln sum of the student (at T), of the teacher (at T), and the student's ln sum at 1

# target: [N, C], or [N, k] probabilities of the classes in indices with target_type "topk_smooth" or "topk_renorm".
# divergence: "kl", "cross" (-p ln q) or "decoupled" (dkd_loss, which alone uses alpha and beta).
_TENSORS = "Tensor input, Tensor target, Tensor? indices, Tensor? labels, Tensor? weight"
_PARAMETERS = (
    "float temperature, str target_type, str divergence, float alpha, float beta, float soft, float hard, "
    "float smoothing, int ignore_index, str reduction"
)


def _loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _forward_fake(input, target, indices, labels, weight, *parameters):
    rows = input.shape[0]
    loss = input.new_empty((rows,) if parameters[-1] == "none" else (), dtype=_loss_dtype(input))
    return loss, loss.new_empty((rows if input.is_cuda else 0, STATS)), loss.new_empty(())


def _setup_context(ctx, inputs, output):
    *tensors, ctx.parameters = *inputs[:5], inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, *tensors, *output[1:])


def _registered_backward(ctx, upstream, *_):
    grad = None if upstream is None else _gradient(torch.ops.kr_fast.distillation_loss_backward, ctx, upstream)
    return grad, *[None] * (4 + len(ctx.parameters))


def _gradient(kernel, ctx, upstream):
    *tensors, stats, scale = saved(ctx)
    if _wants_formula(upstream):
        return reference.derivative(upstream, *tensors, *ctx.parameters)
    return kernel(upstream, *tensors, stats, scale, *ctx.parameters)


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of the vmap of torch.autograd.grad


def _wants_formula(upstream: Tensor) -> bool:
    """Whether backward is itself differentiated (create_graph), or runs for many upstream gradients at once (vmap)."""
    return torch.is_grad_enabled() or _is_batched(upstream)


@define(
    f"distillation_loss_forward({_TENSORS}, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    backward=_registered_backward,
    setup_context=_setup_context,
)
def _forward(input, *arguments):
    return registry.resolve("distillation_loss", ClassesCall(input.device.type, input.dtype, input.shape[1])).forward(
        input, *arguments
    )


def _backward_fake(upstream, input, *arguments):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@define(
    f"distillation_loss_backward(Tensor upstream, {_TENSORS}, Tensor stats, Tensor scale, {_PARAMETERS}) -> Tensor",
    fake=_backward_fake,
)
def _backward(upstream, input, *arguments):
    return registry.resolve("distillation_loss", ClassesCall(input.device.type, input.dtype, input.shape[1])).backward(
        upstream, input, *arguments
    )


class _InTwo(torch.autograd.Function):
    """Forward, then backward, which recomputes from the logits with the upstream gradient folded in in float32."""

    @staticmethod
    def forward(ctx, run, input, target, indices, labels, weight, parameters):
        loss, stats, scale = run.forward(input, target, indices, labels, weight, *parameters)
        save(ctx, input, target, indices, labels, weight, stats, scale)
        ctx.run, ctx.parameters = run, parameters
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return None, _gradient(ctx.run.backward, ctx, upstream), None, None, None, None, None


class _InOne(torch.autograd.Function):
    """Loss and gradient in one pass; backward hands the gradient over where the upstream gradient is 1.

    Not for float16: its gradient would underflow before a loss scale arrives. ``call`` is (kernel, target, indices,
    labels, weight, parameters): one argument, because each costs time, and only ``input`` has a gradient.
    """

    @staticmethod
    def forward(ctx, input, call):
        run, *tensors, parameters = call
        loss, ctx.grad, ctx.scale = run.forward_backward(input, *tensors, *parameters)
        save(ctx, input, *tensors)
        ctx.run, ctx.parameters = run, parameters
        return loss

    @staticmethod
    def backward(ctx, upstream):
        tensors = saved(ctx)  # also refuses logits that were changed in place since
        if _wants_formula(upstream):
            return reference.derivative(upstream, *tensors, *ctx.parameters), None
        # Given away, not shared: autograd may then keep it as .grad without a copy, and add to it.
        grad, ctx.grad = ctx.grad, None
        if grad is not None and ctx.run.rescale_grad:
            ctx.run.rescale_grad(grad, upstream, *tensors, ctx.scale, *ctx.parameters)
            return grad, None
        factor = 0 if grad is None else upstream.item()
        if grad is not None and factor != 1 and grad.dtype == torch.float32:
            grad.mul_(factor)
        elif grad is None or factor != 1:  # a second backward; or another rounding to bfloat16
            grad = ctx.run.backward(upstream, *tensors, None, ctx.scale, *ctx.parameters)
        return grad, None


# Past Function.apply, which unwraps what torch.func has wrapped: check_pair has refused that.
_in_one = super(torch.autograd.Function, _InOne).apply

LAUNCH_ELEMENTS = 2**22  # logits that take about as long to read twice more as a launch


def _pays_in_one(input: Tensor, labels: Tensor | None, weight: Tensor | None, parameters: tuple) -> bool:
    """Whether a GPU had better take the gradient with the loss.

    For a mean it must know the sum of the weights beforehand, which is a launch of its own where there are weights or
    labels: it pays where there is much to read.
    """
    weighted = parameters[-1] == "mean" and (labels is not None or weight is not None)
    return not weighted or input.numel() >= LAUNCH_ELEMENTS


def apply(
    input: Tensor,
    target: Tensor,
    indices: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    parameters: tuple,
) -> Tensor:
    """By the shortest way: the dispatcher costs more than a small batch's kernels, so plain tensors go past it."""
    if torch.compiler.is_compiling() or not is_plain(input, target):
        return torch.ops.kr_fast.distillation_loss_forward(input, target, indices, labels, weight, *parameters)[0]
    run = registry.resolve("distillation_loss", ClassesCall(input.device.type, input.dtype, input.shape[1]))
    if not (input.requires_grad and torch.is_grad_enabled()):
        return run.forward(input, target, indices, labels, weight, *parameters)[0]
    in_one = run.forward_backward and parameters[-1] != "none" and input.dtype != torch.float16
    if in_one and (not run.rescale_grad or _pays_in_one(input, labels, weight, parameters)):
        return _in_one(input, (run, target, indices, labels, weight, parameters))
    return _InTwo.apply(run, input, target, indices, labels, weight, parameters)


def with_gradient(input: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """(loss, its gradient), without autograd; ``arguments`` as for :func:`apply`."""
    *tensors, parameters = (input, *arguments)
    if torch.compiler.is_compiling() or not is_plain(input, arguments[0]):
        forward = torch.ops.kr_fast.distillation_loss_forward
        backward = torch.ops.kr_fast.distillation_loss_backward
    else:
        run = registry.resolve("distillation_loss", ClassesCall(input.device.type, input.dtype, input.shape[1]))
        if run.forward_backward:
            return run.forward_backward(*tensors, *parameters)[:2]
        forward, backward = run.forward, run.backward
    loss, stats, scale = forward(*tensors, *parameters)
    return loss, backward(torch.ones_like(loss), *tensors, stats, scale, *parameters)


def check_pair(op: str, input: Tensor, target: Tensor) -> None:
    """Student logits and what is known of the teacher: floating, on one device, the same rows, no teacher gradient."""
    _check.no_transform(op, input=input, target=target)
    _check.tensor(op, "input", input, ndim=2, dtypes=FLOATS)
    _check.tensor(op, "target", target, ndim=2, dtypes=FLOATS)
    if input.shape[1] < 2:
        _check.fail(op, "input", "have at least 2 classes", input)
    if input.layout is not torch.strided or target.layout is not torch.strided:
        _check.fail(op, "input and target", "be dense", f"{input.layout} and {target.layout}")
    if input.device != target.device:
        _check.fail(op, "target", f"be on input's device {input.device}", target)
    if target.requires_grad:
        _check.fail(op, "target", "not require a gradient (detach the teacher)", target)


def check_same_shape(op: str, input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        _check.fail(op, "target", f"have input's shape {list(input.shape)}", target)


def checked_options(
    op, input, labels, sample_weight, *, temperature, target_type, divergence="kl", alpha=0.0, beta=0.0,
    soft_weight=1.0, hard_weight=0.0, label_smoothing=0.0, ignore_index=-100, reduction,
) -> tuple[Tensor | None, Tensor | None, tuple]:  # fmt: skip
    """Labels, weight and parameters for :func:`apply`."""
    if not torch.compiler.is_compiling():
        _check.no_trace(op)
    options = _options.__wrapped__ if torch.compiler.is_compiling() else _options
    parameters = options(
        op, temperature, target_type, divergence, alpha, beta, soft_weight, hard_weight, label_smoothing, ignore_index,
        reduction,
    )  # fmt: skip
    needed = "the loss is decoupled" if divergence == "decoupled" else "hard_weight is above 0" if hard_weight else None
    return checked_labels(op, labels, input, needed), checked_weight(op, sample_weight, input), parameters


@functools.lru_cache(maxsize=1024, typed=True)  # a training loop asks for the same ones again and again
def _options(
    op, temperature, target_type, divergence, alpha, beta, soft_weight, hard_weight, label_smoothing, ignore_index,
    reduction,
) -> tuple:  # fmt: skip
    weights = {"soft_weight": soft_weight, "hard_weight": hard_weight, "alpha": alpha, "beta": beta}
    check_options(op, temperature, reduction, label_smoothing, **weights)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        _check.fail(op, "ignore_index", "be an int", ignore_index, TypeError)
    return (
        float(temperature), target_type, divergence, float(alpha), float(beta), float(soft_weight),
        float(hard_weight), float(label_smoothing), int(ignore_index), reduction,
    )  # fmt: skip


def check_options(op: str, temperature: float, reduction: str, label_smoothing: float = 0.0, **weights: float) -> None:
    for name, value in ("temperature", temperature), ("label_smoothing", label_smoothing), *weights.items():
        # A tensor would also do, but reading it is a wait for a GPU.
        if isinstance(value, Tensor) or not isinstance(value, (float, int, numbers.Real, torch.SymFloat)):
            _check.fail(op, name, "be a number", value, TypeError)
    if not (0 < temperature < math.inf):
        _check.fail(op, "temperature", "be above 0 and finite", temperature)
    if reduction not in REDUCTIONS:
        _check.fail(op, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction)
    for name, value in weights.items():
        if not (0 <= value < math.inf):
            _check.fail(op, name, "be at least 0 and finite", value)
    if not 0 <= label_smoothing < 1:
        _check.fail(op, "label_smoothing", "be in [0, 1)", label_smoothing)


def check_values(op: str, target: Tensor, target_type: str, weight: Tensor | None) -> None:
    """What ``validate_args`` asks for: it reads the values, and so waits for a GPU."""
    if target_type in ("probs", "log_probs"):
        p = target.double() if target_type == "probs" else target.double().exp()
        if bool((~(p >= 0)).any()):  # NaN as well
            at = (~(p >= 0)).nonzero()[0].tolist()
            rule = "hold probabilities, at least 0" if target_type == "probs" else "hold log-probabilities, not NaN"
            _check.fail(op, "target", rule, f"{target[tuple(at)].item()} at {at}")
        total = p.sum(1)
        if bool(((total - 1).abs() > 1e-2).any()):  # rows that were rounded to bfloat16 pass
            row = int(((total - 1).abs() > 1e-2).nonzero()[0])
            _check.fail(op, "target", "have rows that sum to 1", f"{total[row].item():.6g} in row {row}")
    elif bool(torch.isnan(target).any()):
        _check.fail(op, "target", "not hold NaN", f"NaN at {torch.isnan(target).nonzero()[0].tolist()}")
    if weight is not None and bool((~(weight >= 0)).any()):
        row = int((~(weight >= 0)).nonzero()[0])
        _check.fail(op, "sample_weight", "be at least 0", f"{weight[row].item()} in row {row}")


def checked_labels(op: str, labels: Tensor | None, input: Tensor, needed: str | None) -> Tensor | None:
    """int64 and contiguous; ``needed`` says what there is no way without them for, if anything."""
    if labels is None:
        if needed:
            _check.fail(op, "labels", f"be given where {needed}", None, TypeError)
        return None
    return _check.labels(op, labels, input.shape[:1], input.device)


def checked_weight(op: str, sample_weight: Tensor | None, input: Tensor) -> Tensor | None:
    if sample_weight is None:
        return None
    _check.tensor(op, "sample_weight", sample_weight, ndim=1)
    if sample_weight.shape[0] != input.shape[0] or sample_weight.device != input.device:
        _check.fail(op, "sample_weight", f"be [{len(input)}] on {input.device}", sample_weight)
    if sample_weight.requires_grad:
        _check.fail(op, "sample_weight", "not require a gradient (detach it)", sample_weight)
    return sample_weight.to(_loss_dtype(input)).contiguous()


def rows_of_stride_1(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
