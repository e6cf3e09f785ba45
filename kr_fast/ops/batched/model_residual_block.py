"""A residual block of M models in one call: two 3x3 convolutions, what stands between and behind them, and the sum."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import ModelResidualBlock
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

_OP = "model_residual_block"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake(x, weight1, bias1, weight2, bias2, scale, shift, relu):
    return torch.empty_like(x)


@define(
    "model_residual_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? scale, "
    "Tensor? shift, bool relu) -> Tensor",
    fake=_fake,
)
def _impl(x, weight1, bias1, weight2, bias2, scale, shift, relu):
    if x.numel() == 0:
        return torch.empty_like(x)
    run = registry.resolve(_OP, ResidualBlockCall(x.device.type, x.dtype, x.shape[4], x.shape[2], x.shape[3]))
    return run(ModelResidualBlock(x, weight1, bias1, weight2, bias2, scale, shift, relu))


def model_residual_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """Residual blocks of M models, channels last, of as many channels out as in.

    ``y = act(conv(relu(conv(p, weight1) + bias1), weight2) + bias2 + x)``, each ``conv`` 3x3 with a border of zeros,
    ``act`` a ReLU or nothing, and ``p = x`` (the basic block of He et al., "Deep Residual Learning for Image
    Recognition", CVPR 2016, figure 5 left) or ``p = relu(scale x + shift)`` (the block with pre-activation of He et
    al., "Identity Mappings in Deep Residual Networks", ECCV 2016, equation 5, whose first BatchNorm cannot be folded).
    Sums are taken in float32 (float64 for float64); ``p``, what lies between the convolutions and the result are
    rounded to ``x``'s dtype.

    The CUDA kernel reads ``x`` once and writes the result once: 4 bytes an element in half precision where layer by
    layer 10 move, or 14 with pre-activation. It takes float16 and bfloat16, 16, 32 or 64 channels, and images of
    which one fits a block of threads: on compute capability 9.0 such as 32x32 at 16 and 32 channels and 16x16 at 64.
    There an output has the same bits whatever models and images stand beside it. Not differentiable.

    Args:
        x: ``[M, N, H, W, C]`` contiguous; float32, bfloat16 or float16 (float64 on the reference backend).
        weight1, weight2: ``[M, C, 3, 3, C]`` contiguous (output channel, kernel row, column, input channel), of
            ``x``'s dtype.
        bias1, bias2: ``[M, C]`` float32 (float64 for float64), or None.
        scale, shift: ``[M, C]`` like the biases, both or neither: the pre-activation.
        relu: whether a ReLU follows the sum.
    Returns: like ``x``.
    Raises: TypeError or ValueError naming the argument.
    """
    _check.tensor(_OP, "x", x, ndim=5, dtypes=_DTYPES)
    models, _, _, _, channels = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    _check.contiguous(_OP, "x", x)
    if channels == 0:
        _check.fail(_OP, "x", "have at least one channel", x)
    for name, value in (("weight1", weight1), ("weight2", weight2)):
        _check.operand(_OP, name, value, (models, channels, 3, 3, channels), like=x, dtypes=(x.dtype,))
    for name, value in (("bias1", bias1), ("bias2", bias2), ("scale", scale), ("shift", shift)):
        if value is not None:
            _check.operand(_OP, name, value, (models, channels), like=x, dtypes=(exact,))
    if (scale is None) != (shift is None):
        name = "shift" if shift is None else "scale"
        _check.fail(_OP, name, "be given with the other of scale and shift", None)
    _check.no_grad(_OP, x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, scale=scale, shift=shift)
    op = torch.ops.kr_fast.model_residual_block.default
    return call(op, x, weight1, bias1, weight2, bias2, scale, shift, bool(relu))


def runs_preferred(device: str, dtype: torch.dtype, channels: int, height: int, width: int) -> bool:
    """Whether the device's first choice runs such blocks: on a GPU the kernel, on a CPU the reference."""
    return registry.runs_preferred(_OP, ResidualBlockCall(device, dtype, channels, height, width))
