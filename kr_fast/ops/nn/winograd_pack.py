"""The weights of winograd_conv2d, transformed once."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.nn import reference

_OP = "winograd_pack"


@torch.no_grad()
def winograd_pack(
    weight: Tensor, scale: Tensor | None = None, *, turned: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight of :func:`kr_fast.winograd_conv2d`: ``U = G (scale g) G^T`` of each output and input, in float64.

    Args:
        weight: ``[O, I, 3, 3]`` of any floating dtype.
        scale: float64 ``[O]``, of a BatchNorm behind the convolution; None for 1.
        turned: pack the filters turned by 180 degrees with inputs and outputs swapped: of the gradient of the
            convolution's output they make that of its input. Then there is no ``scale``.
        dtype: of the result, float32 or float64.
    Returns: ``[36, ceil(O / block), ceil(I / 16) * 16, block]``, block 16 for up to 16 outputs and 32 beyond; zeros
        where there is no output or input; O and I swapped if ``turned``. Detached: there is no derivative.
    Raises: TypeError or ValueError naming the argument.
    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, eq. 8-12.
    """
    _check.tensor(_OP, "weight", weight, ndim=4)
    if not weight.is_floating_point() or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        _check.fail(_OP, "weight", "be floating point [O, I, 3, 3]", weight)
    if dtype not in (torch.float32, torch.float64):
        _check.fail(_OP, "dtype", "be float32 or float64", dtype, TypeError)
    if not isinstance(turned, bool):
        _check.fail(_OP, "turned", "be a bool", turned, TypeError)
    if scale is not None:
        if turned:
            _check.fail(_OP, "scale", "be None with turned", scale)
        _check.operand(_OP, "scale", scale, weight.shape[:1], like=weight, dtypes=(torch.float64,), contiguous=False)
        scale = scale.contiguous()
    return call(torch.ops.kr_fast.winograd_pack.default, weight, scale, turned, dtype)


def _empty(weight: Tensor, _: Tensor | None, turned: bool, dtype: torch.dtype) -> Tensor:
    outputs, inputs = weight.shape[:2]
    shape = reference.packed_shape(inputs, outputs) if turned else reference.packed_shape(outputs, inputs)
    return torch.empty(shape, dtype=dtype, device=weight.device)


@define("winograd_pack(Tensor weight, Tensor? scale, bool turned, ScalarType dtype) -> Tensor", fake=_empty)
def unchecked(weight: Tensor, scale: Tensor | None, turned: bool, dtype: torch.dtype) -> Tensor:
    """For callers whose arguments are right by construction."""
    packed = _empty(weight, scale, turned, dtype)
    transform = reference.transforms()[1]
    if torch.float64 in (weight.dtype, dtype):  # of which the definition is the only kernel
        reference.winograd_pack(weight, scale, turned, transform, packed)
    else:
        run = registry.resolve(_OP, Call(weight.device.type, dtype))
        run(weight.float(), scale, turned, transform, packed)
    return packed
