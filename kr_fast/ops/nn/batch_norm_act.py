"""BatchNorm in training, with the residual sum and the ReLU behind it."""

import numbers

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import BatchNormAct, BatchNormActGradient
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, is_direct, save, saved, wants_dispatcher

_OP = "batch_norm_act"
_LAST = torch.channels_last


def _kernels(x: Tensor) -> registry.Differentiable:
    return registry.resolve(_OP, Call(x.device.type, x.dtype))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_LAST)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _keep(ctx, norm: BatchNormAct, y: Tensor, mean: Tensor, var: Tensor) -> None:
    ctx.relu, ctx.residual, ctx.eps = norm.relu, norm.residual is not None, norm.eps
    save(ctx, norm.x, y if norm.relu and ctx.residual else None, norm.weight, norm.bias, mean, var)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _keep(ctx, BatchNormAct(*inputs), *output)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual."""
    x, y, weight, bias, mean, var = saved(ctx)
    grad = grad.contiguous(memory_format=_LAST)
    needed = ctx.needs_input_grad
    passes = ctx.relu and ctx.residual and needed[3]
    norm = BatchNormActGradient(grad, x, y, weight, bias, mean, var, ctx.relu, passes, ctx.eps)
    if wants_dispatcher(grad):
        out, grad_weight, grad_bias, passed = torch.ops.kr_fast.batch_norm_act_backward(*norm)
    else:
        out, grad_weight, grad_bias, passed = _kernels(x).backward(norm)
    gradients = out, grad_weight, grad_bias, passed if passes else grad
    return tuple(each if needs else None for each, needs in zip(gradients, needed, strict=False))


def _gradient(ctx, grad, *_):
    return (*((None,) * 4 if grad is None else _gradients(ctx, grad)), None, None)


@define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (_like(x), _statistic(x), _statistic(x)),
    backward=_gradient,
    setup_context=_setup_context,
)
def _forward(*arguments):
    norm = BatchNormAct(*arguments)
    return _kernels(norm.x).forward(norm)


def _fake_backward(*arguments):
    norm = BatchNormActGradient(*arguments)
    passed = _like(norm.x) if norm.passes else norm.x.new_empty(0)
    return _like(norm.x), torch.empty_like(norm.mean), torch.empty_like(norm.mean), passed


@define(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "bool relu, bool passes, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(*arguments):
    norm = BatchNormActGradient(*arguments)
    return _kernels(norm.x).backward(norm)


class _Plain(torch.autograd.Function):
    """The op past the dispatcher, which costs as much as a small layer."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, relu, eps):
        norm = BatchNormAct(x, weight, bias, residual, relu, eps)
        y, mean, var = _kernels(x).forward(norm)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        _keep(ctx, norm, y, mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        return _gradient(ctx, grad)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """BatchNorm by the statistics of the batch, the residual sum and the ReLU: two reads of ``x`` and one write.

    ``y = act(weight[c] (x - mean[c]) / sqrt(var[c] + eps) + bias[c] + residual)``; mean and biased variance over n, h,
    w, the variance about the mean, sums of chunks in float32 and over them in float64. Differentiable in ``x``,
    ``weight``, ``bias`` and ``residual``, once (a second derivative is refused); the gradient of ReLU at 0 is 0. The
    bits do not depend on the number of threads.

    The running statistics are updated in place as ``nn.BatchNorm2d`` does, outside autograd: ``running_mean`` moves by
    ``momentum`` towards ``mean``, ``running_var`` towards ``var * R / (R - 1)``, ``R = N H W``.
    ``num_batches_tracked`` is the module's; one with ``momentum=None`` passes ``1 / num_batches_tracked``.

    Args:
        x: ``[N, C, H, W]``, channels_last; float32, bfloat16 or float16 (float64 on the reference backend).
        weight, bias: ``[C]`` float32 (float64 for float64), or None for 1 and 0.
        running_mean, running_var: ``[C]`` likewise, both or neither; they must not require grad.
        residual: like ``x``, channels_last, or None.
        momentum: in [0, 1].
        eps: at least 0.
        activation: "relu" or None.
    Returns: ``[N, C, H, W]`` of ``x``'s dtype, channels_last.
    Raises: TypeError or ValueError naming the argument; ValueError if a channel has fewer than 2 numbers.
    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1 and section 3; He et al., "Deep Residual
        Learning", CVPR 2016, eq. 1; statistics by chunks: Chan, Golub and LeVeque, 1979, eq. 2.1.
    """
    _check.channels_last(_OP, "x", x, dtypes=_check.FLOATING)
    batch, channels, height, width = x.shape
    rows = batch * height * width
    if rows < 2 or channels == 0:
        _check.fail(_OP, "x", "hold at least 2 numbers of each channel", x)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    dtypes = (torch.promote_types(x.dtype, torch.float32),)
    for name, value in vectors.items():
        if value is not None:
            _check.operand(_OP, name, value, (channels,), like=x, dtypes=dtypes)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        _check.fail(_OP, missing, "be given where the other running statistic is", None)
    if residual is not None:
        _check.channels_last(_OP, "residual", residual, dtypes=(x.dtype,))
        if residual.shape != x.shape or residual.device != x.device:
            _check.fail(_OP, "residual", f"match x ({_check.describe(x)})", residual)
    if not isinstance(momentum, numbers.Real):
        _check.fail(_OP, "momentum", "be a number", momentum, TypeError)
    if not 0 <= momentum <= 1:
        _check.fail(_OP, "momentum", "be in [0, 1]", momentum)
    if not eps >= 0:
        _check.fail(_OP, "eps", "be at least 0", eps)
    if activation not in ("relu", None):
        _check.fail(_OP, "activation", "be 'relu' or None", activation)
    if running_mean is not None:
        for name in ("running_mean", "running_var"):
            if vectors[name].requires_grad:
                _check.fail(_OP, name, "not require grad", vectors[name])
    arguments = (x, weight, bias, residual, activation == "relu", float(eps))
    if is_direct(x, weight, bias, residual):
        y, mean, var = _Plain.apply(*arguments)
    else:
        y, mean, var = call(torch.ops.kr_fast.batch_norm_act.default, *arguments)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * rows / (rows - 1))
    return y
