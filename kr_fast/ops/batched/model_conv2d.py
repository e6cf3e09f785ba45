"""One convolution of M models in one call: each model its own weights, bias, residual sum and activation fused."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import ConvOptions, View
from kr_fast.backends.calls import ConvCall
from kr_fast.ops import _check
from kr_fast.ops._library import call, define
from kr_fast.ops.batched import model_conv2d_backward

_OP = "model_conv2d"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Name -> number of scalars. An activation is its name, or (name, scalars, algorithm).
ACTIVATIONS = dict.fromkeys(("relu", "swish", "gelu", "hardswish", "sigmoid", "tanh"), 0)
ACTIVATIONS |= {"leaky_relu": 1, "hardtanh": 2}


def _fake(x, weight, bias, residual, rows, columns, scale, shift, stride, padding, dilation, *_):
    size = x.shape[2:4] if rows is None else (rows.shape[0], columns.shape[0])
    out = ConvOptions(stride, padding, dilation).output_size(size, weight.shape[2:4])
    dtype = x.dtype if rows is None else weight.dtype
    return weight.new_empty(weight.shape[0], x.shape[1], *out, weight.shape[1], dtype=dtype)


@define(
    "model_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? rows, Tensor? columns, "
    "Tensor? scale, Tensor? shift, int[] stride, int[] padding, int[] dilation, int groups, str activation, "
    "float[] scalars, str algorithm, int config) -> Tensor",
    fake=_fake,
    backward=model_conv2d_backward.backward,
    setup_context=model_conv2d_backward.setup_context,
)
def _impl(x, weight, bias, residual, rows, columns, scale, shift, *parameters):
    *geometry, groups, name, scalars, algorithm, config = parameters
    activation = (name, tuple(scalars), algorithm) if name else None
    options = ConvOptions(*map(tuple, geometry), groups, activation, config)
    if rows is None and weight.dtype != x.dtype:  # float32 weights of a model that learns in half precision
        weight = weight.to(x.dtype)
    run = registry.resolve(_OP, ConvCall(x.device.type, weight.dtype, options.kind(x.shape[4])))
    return run(x, weight, bias, residual, None if rows is None else View(rows, columns, scale, shift), options)


def model_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    view: View | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | tuple[str, Sequence[float], str] | None = None,
    config: int = 0,
) -> Tensor:
    """Convolutions of M models, channels last, with what stands behind them.

    ``y[m, n, i, j, o] = act(sum_{u, v, c} x[m, n, s i + d u - p, s j + d v - p, c] weight[m, o, u, v, c] + bias[m, o]
    + residual[m, n, i, j, o])``: cross-correlation with zeros around ``x``, products and sums in float32 (float64 for
    float64) in the order u, v, c, one rounding at the end. float32 products are exact float32, never TF32. An output
    has the same bits whatever models and images stand beside it. A linear layer is the case ``H = W = kh = kw = 1``,
    a BatchNorm the depthwise case ``kh = kw = 1``.

    Once differentiable in ``x`` (not shared), ``weight`` and ``bias`` where there is no residual, view or activation;
    ``weight`` may then be float32 for ``x`` in half precision, see ``model_conv2d_backward``. A second
    derivative is refused.

    Args:
        x: ``[M, N, H, W, C]`` contiguous, or ``[1, N, H, W, C]`` that all models share; float32, bfloat16 or float16
            (float64 on the reference backend). With ``view``: uint8 ``[1, N, H', W', C]``.
        weight: ``[M, O, kh, kw, C / groups]`` contiguous; of ``x``'s dtype, which is the output's.
        bias: ``[M, O]`` float32 (float64 for float64), or None.
        residual: like the output, or None.
        view: index vectors and scale through which uint8 images are read; no copy of them is written.
        stride, padding, dilation: numbers, or (vertical, horizontal).
        groups: 1, or C (depthwise; O a multiple of C). Others run on the reference backend alone.
        activation: one of ACTIVATIONS' names ("swish" is SiLU), or ``(name, scalars, algorithm)`` as oneDNN writes
            them: ``("hardtanh", (low, high), "")``, ``("leaky_relu", (slope,), "")``, ``("gelu", (), "tanh")``.
        config: which of a GPU kernel's tile shapes, of :func:`configs`; the result has the same bits.
    Returns: ``[M, N, H_out, W_out, O]`` contiguous.
    Raises: TypeError or ValueError naming the argument.
    """
    _check.tensor(_OP, "weight", weight, ndim=5, dtypes=_DTYPES)
    given = (x, weight, bias, residual)
    learns = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in given)
    dtypes = _DTYPES[:3] if learns and weight.dtype == torch.float32 else (weight.dtype,)
    _check.tensor(_OP, "x", x, ndim=5, dtypes=dtypes if view is None else (torch.uint8,))
    models, outputs, *kernel, inputs = weight.shape
    for name, value in (("x", x), ("weight", weight)):
        _check.contiguous(_OP, name, value)
    if weight.device != x.device:
        _check.fail(_OP, "weight", f"be on {x.device}", weight)
    if x.shape[0] != models and (x.shape[0] != 1 or models == 0):
        _check.fail(_OP, "x", f"hold 1 or {models} models", x)
    if view is not None and x.shape[0] != 1:
        _check.fail(_OP, "x", "be shared by all models where a view is given", x)
    groups = _check.integer(_OP, "groups", groups, 1, 2**31)
    channels = x.shape[4]
    if channels == 0 or inputs * groups != channels or outputs == 0 or outputs % groups or 0 in kernel:
        rule = f"be [M, O, kh, kw, {channels} / groups] with O a multiple of {groups} groups"
        _check.fail(_OP, "weight", rule, weight)
    stride, padding, dilation = (
        _pair(name, value, low)
        for name, value, low in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    size = x.shape[2:4] if view is None else _view_size(view, x)
    out = ConvOptions(stride, padding, dilation).output_size(size, kernel)
    if min(out) < 1:
        _check.fail(_OP, "weight", f"have a kernel that fits the {size[0]} x {size[1]} input with its padding", weight)
    if x.shape[1] * out[0] * out[1] >= 2**31:
        _check.fail(_OP, "x", f"give fewer than 2^31 pixels a model, {out[0]} x {out[1]} for an image", x)
    if bias is not None:
        exact = torch.promote_types(weight.dtype, torch.float32)
        _check.operand(_OP, "bias", bias, (models, outputs), like=x, dtypes=(exact,))
    if residual is not None:
        shape = (models, x.shape[1], *out, outputs)
        _check.operand(_OP, "residual", residual, shape, like=x, dtypes=(weight.dtype,))
    name, scalars, algorithm = _activation(activation)
    config = _check.integer(_OP, "config", config, 0, 2**31)
    if learns:
        for argument, value in (("residual", residual), ("view", view), ("activation", activation)):
            if value is not None:
                _check.fail(_OP, argument, "be None where a gradient is requested", value)
        if x.shape[0] != models:
            _check.fail(_OP, "x", f"hold {models} models where a gradient is requested", x)
        if x.shape[1:4].numel() >= 2**31:
            _check.fail(_OP, "x", "have fewer than 2^31 pixels a model", x)
    tensors, geometry = (x, weight, bias, residual, *(view or (None,) * 4)), (stride, padding, dilation, groups)
    return call(torch.ops.kr_fast.model_conv2d.default, *tensors, *geometry, name, scalars, algorithm, config)


def configs(weight: Tensor, groups: int = 1, shared: bool = False) -> int:
    """How many tile shapes a GPU has for such weights ``[M, O, kh, kw, C / groups]``; 1 where the choice is fixed."""
    if groups != 1 or weight.dtype == torch.float64 or registry.refusal(_OP, "triton", ConvCall("cuda", weight.dtype)):
        return 1
    from kr_fast.kernels.batched import model_conv2d as kernels

    return len(kernels.tiles(weight.shape[4], weight.shape[1:4], weight.element_size(), shared, weight.shape[0]))


def _pair(name: str, value: int | Sequence[int], low: int) -> list[int]:
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2:
        _check.fail(_OP, name, "be a number or two", value)
    return [_check.integer(_OP, name, each, low, 2**15) for each in pair]


def _view_size(view: View, x: Tensor) -> tuple[int, int]:
    for name, value, dtype in (("rows", view.rows, torch.int32), ("columns", view.columns, torch.int32)):
        _check.tensor(_OP, f"view.{name}", value, ndim=1, dtypes=(dtype,))
        if value.device != x.device or not value.is_contiguous() or len(value) == 0:
            _check.fail(_OP, f"view.{name}", f"be contiguous and not empty on {x.device}", value)
        limit = x.shape[2 if name == "rows" else 3]
        if value.device.type == "cpu" and not 0 <= int(value.min()) <= int(value.max()) < limit:
            _check.fail(_OP, f"view.{name}", f"lie in [0, {limit})", [int(value.min()), int(value.max())])
    for name, value in (("scale", view.scale), ("shift", view.shift)):
        _check.operand(_OP, f"view.{name}", value, (x.shape[4],), like=x, dtypes=(torch.float32,))
    return len(view.rows), len(view.columns)


def _activation(activation: str | tuple | None) -> tuple[str, list[float], str]:
    if activation is None:
        return "", [], ""
    name, scalars, algorithm = (activation, (), "") if isinstance(activation, str) else activation
    if name not in ACTIVATIONS:
        _check.fail(_OP, "activation", f"be one of {', '.join(ACTIVATIONS)}", name)
    if len(scalars) != ACTIVATIONS[name]:
        _check.fail(_OP, "activation", f"give {ACTIVATIONS[name]} scalars for {name}", activation)
    if name == "gelu":
        algorithm = algorithm or "none"
        if algorithm not in ("none", "tanh"):
            _check.fail(_OP, "activation", "be exact gelu ('none') or 'tanh'", activation)
    return name, [float(each) for each in scalars], algorithm
