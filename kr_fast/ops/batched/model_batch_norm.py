"""BatchNorm in training for M models in one call, with the residual sum and the ReLU behind it."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import BatchNorm, BatchNormGradient
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define, save, saved

_OP = "model_batch_norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake(x, weight, bias, residual, relu, eps):
    statistic = x.new_empty(x.shape[0], x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


def _setup_context(ctx, inputs, output):
    x, weight, _, residual, ctx.relu, ctx.eps = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.residual = residual is not None
    save(ctx, x, y if ctx.relu else None, weight, mean, var)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    x, y, weight, mean, var = saved(ctx)
    grad = grad.contiguous()
    out, grad_weight, grad_bias, passed = torch.ops.kr_fast.model_batch_norm_backward(
        grad, x, y, weight, mean, var, ctx.relu, ctx.residual and ctx.relu, ctx.eps
    )
    passed = passed if ctx.relu else grad
    gradients = zip((out, grad_weight, grad_bias, passed), ctx.needs_input_grad, strict=False)
    return (*(each if needed else None for each, needed in gradients), None, None)


@define(
    "model_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backward=_gradient,
    setup_context=_setup_context,
)
def _forward(x, *rest):
    return registry.resolve(_OP, Call(x.device.type, x.dtype)).forward(BatchNorm(x, *rest))


def _fake_backward(*arguments):
    call = BatchNormGradient(*arguments)
    passed = torch.empty_like(call.x) if call.residual else call.x.new_empty(0)
    return torch.empty_like(call.x), torch.empty_like(call.mean), torch.empty_like(call.mean), passed


@define(
    "model_batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var, bool relu, "
    "bool residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(grad, x, *rest):
    return registry.resolve(_OP, Call(x.device.type, x.dtype)).backward(BatchNormGradient(grad, x, *rest))


def model_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each model's activations by the statistics of its own batch, channels last: BatchNorm in training mode.

    ``y = act(weight[m, c] (x - mean[m, c]) / sqrt(var[m, c] + eps) + bias[m, c] + residual)``, ``act`` = ReLU or
    nothing; mean and biased variance over n, h, w, the variance about the mean, all in float32 (float64 for float64).
    A model's result and gradients have the same bits whatever models stand beside it. Differentiable in ``x``,
    ``weight``, ``bias`` and ``residual``, once (a second derivative is refused); the gradient of ReLU at 0 is 0.

    Running statistics are the caller's: torch moves them by ``momentum`` towards ``mean`` and
    ``var * R / (R - 1)`` with ``R = N H W``, see :func:`update_running`.

    Args:
        x: ``[M, N, H, W, C]`` contiguous; float32, bfloat16, float16 (float64 on the reference backend).
        weight, bias: ``[M, C]`` contiguous float32 (float64 for float64), or None for 1 and 0.
        residual: like ``x``, or None.
        relu: whether a ReLU stands behind the sum.
        eps: above 0.
    Returns: ``y`` like ``x``; ``mean`` and ``var`` ``[M, C]`` float32 (float64), without gradient.
    Raises: TypeError or ValueError naming the argument; ValueError if a channel has fewer than 2 numbers.
    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1 and section 3; statistics by chunks: Chan,
        Golub and LeVeque, 1979, eq. 2.1.
    """
    _check.tensor(_OP, "x", x, ndim=5, dtypes=_DTYPES)
    _check.contiguous(_OP, "x", x)
    if x.shape[1:4].numel() < 2 or x.numel() == 0:
        _check.fail(_OP, "x", "hold at least 2 numbers of each channel", x)
    shape, exact = (x.shape[0], x.shape[4]), torch.promote_types(x.dtype, torch.float32)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.operand(_OP, name, value, shape, like=x, dtypes=(exact,))
    if residual is not None:
        _check.operand(_OP, "residual", residual, x.shape, like=x, dtypes=(x.dtype,))
    if not eps > 0:
        _check.fail(_OP, "eps", "be above 0", eps)
    return call(torch.ops.kr_fast.model_batch_norm.default, x, weight, bias, residual, bool(relu), float(eps))


def update_running(running: Tensor, batch: Tensor, rate: Tensor | float) -> None:
    """In place, ``running += rate (batch - running)``; ``rate`` is torch's momentum, a number or ``[M, 1]``.

    Rate 0 leaves a model's statistics as they are, whatever the batch holds.
    """
    if isinstance(rate, Tensor):
        running.copy_(torch.where(rate == 0, running, torch.lerp(running, batch, rate)))
    else:
        running.lerp_(batch, rate)
