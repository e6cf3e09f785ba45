"""Convolutions and residual blocks as the structs of ``csrc``, as :mod:`.structs` has the other ops."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.arguments import (
    BlockLayers,
    BlockState,
    DirectConv,
    DirectConvGradient,
    PreactivationBlock,
    WinogradConv,
    WinogradGradWeight,
)
from kr_fast.backends.codes import ACTIVATIONS
from kr_fast.backends.native import address
from kr_fast.backends.structs import Struct


def direct_conv(call: DirectConv, weight: Tensor, y: Tensor) -> Struct:
    """``kr::DirectConv`` that writes into ``y``; the taps of ``weight``, the call's, lie equally far apart."""
    return {
        "shape": _conv_shape(call.x.shape, weight.shape, y.shape, call.stride, call.padding),
        "batch": len(y),
        "x": call.x.data_ptr(),
        "weight": weight.data_ptr(),
        "steps": _steps(weight),
        "bias": address(call.bias),
        "y": y.data_ptr(),
    }


def direct_conv_gradient(
    call: DirectConvGradient,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Struct:
    """``kr::DirectConvBackward`` that writes into the last three; ``weight`` as for :func:`direct_conv`."""
    grad_y, x = call.grad_output, call.x
    return {
        "shape": _conv_shape(x.shape, weight.shape, grad_y.shape, call.stride, call.padding),
        "batch": len(x),
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "steps": _steps(weight),
        "grad_y": grad_y.data_ptr(),
        "grad_x": address(grad_x),
        "grad_weight": address(grad_weight),
        "grad_steps": _steps(weight if grad_weight is None else grad_weight),
        "grad_bias": address(grad_bias),
    }


@functools.lru_cache(maxsize=1024)
def _conv_shape(x: torch.Size, weight: torch.Size, y: torch.Size, stride, padding) -> Struct:
    sizes = {"height": x[2], "width": x[3], "inputs": x[1]}
    sizes |= {"output_height": y[2], "output_width": y[3], "outputs": y[1]}
    sizes |= {"kernel_height": weight[2], "kernel_width": weight[3]}
    sizes |= {"stride_y": stride[0], "stride_x": stride[1], "pad_y": padding[0], "pad_x": padding[1]}
    return sizes


def _steps(weight: Tensor) -> Struct:
    output, inputs, down, across = weight.stride()
    return {"output": output, "input": inputs, "tap": across if weight.shape[3] > 1 else down}


def residual_block(
    x: Tensor, layers: BlockLayers, state: BlockState | None, winograd: list[bool], transform: Tensor, y: Tensor | None
) -> Struct:
    """``kr::ResidualBlock``; without ``y`` for backward, without ``state`` for inference."""
    batch, inputs, height, width = x.shape
    strides = [weight.stride() for weight in layers.weights]
    norms, running = layers.norms, layers.running
    return {
        "x": x.data_ptr(),
        "batch": batch,
        "height": height,
        "width": width,
        "inputs": inputs,
        "outputs": len(layers.weights[0]),
        "stride": layers.stride,
        "projection": len(strides) == 3,
        "winograd": winograd,
        "weight": [weight.data_ptr() for weight in layers.weights],
        "input_step": [stride[1] for stride in strides],
        "tap_step": [stride[3] for stride in strides],
        "transform": transform.data_ptr(),
        "norm_weight": [address(each) for each in norms[::2]],
        "norm_bias": [address(each) for each in norms[1::2]],
        "running_mean": [address(each) for each in running[::2]],  # none in backward
        "running_var": [address(each) for each in running[1::2]],
        "momentum": list(layers.momentum),
        "eps": list(layers.eps),
        **dict(zip(("convolved", "statistics", "positive"), map(address, state or (None,) * 3), strict=True)),
        "y": address(y),
    }


def residual_block_gradient(
    grad: Tensor, grad_x: Tensor | None, grad_weights: list[Tensor], grad_norm: Tensor
) -> Struct:
    """``kr::ResidualBlockGradient`` that writes into the last three."""
    return {
        "grad": grad.data_ptr(),
        "grad_x": address(grad_x),
        "grad_weight": [each.data_ptr() for each in grad_weights],
        "grad_norm": grad_norm.data_ptr(),
    }


def winograd_conv(call: WinogradConv, y: Tensor) -> Struct:
    """``kr::WinogradConv`` that writes into ``y``."""
    batch, inputs, height, width = call.x.shape
    return {
        "x": call.x.data_ptr(),
        "batch": batch,
        "height": height,
        "width": width,
        "inputs": inputs,
        "weight": call.weight.data_ptr(),
        "scale": address(call.scale),
        "bias": address(call.bias),
        "residual": address(call.residual),
        "activation": ACTIVATIONS.index(call.activation),
        "pool": call.pool,
        "y": y.data_ptr(),
        "outputs": call.outputs,
    }


def winograd_grad_weight(call: WinogradGradWeight) -> Struct:
    """``kr::WinogradGradWeight``."""
    batch, inputs, height, width = call.x.shape
    _, input_step, _, tap_step = call.grad_weight.stride()
    return {
        "x": call.x.data_ptr(),
        "grad_output": call.grad_output.data_ptr(),
        "batch": batch,
        "height": height,
        "width": width,
        "inputs": inputs,
        "outputs": call.grad_output.shape[1],
        "grad_weight": call.grad_weight.data_ptr(),
        "input_step": input_step,
        "tap_step": tap_step,
        "grad_bias": address(call.grad_bias),
    }


def winograd_pack(weight: Tensor, scale: Tensor | None, turned: bool, transform: Tensor, packed: Tensor) -> Struct:
    """``kr::WinogradPack`` that writes into ``packed``; the taps of ``weight`` lie equally far apart."""
    (outputs, inputs, _, _), (output_step, input_step, _, tap_step) = weight.shape, weight.stride()
    first = weight.data_ptr()
    if turned:  # from the last tap back to the first
        first += 8 * tap_step * weight.element_size()
        outputs, inputs, output_step, input_step, tap_step = inputs, outputs, input_step, output_step, -tap_step
    return {
        "weight": first,
        "outputs": outputs,
        "inputs": inputs,
        "output_step": output_step,
        "input_step": input_step,
        "tap_step": tap_step,
        "scale": address(scale),
        "transform": transform.data_ptr(),
        "packed": packed.data_ptr(),
    }


def preactivation_block(
    call: PreactivationBlock, state: Sequence[Tensor], transform: Tensor, y: Tensor | None
) -> Struct:
    """``kr::PreactivationBlock``; without ``y`` for backward."""
    (batch, channels, height, width), (first, second, convolved, statistics) = call.x.shape, state
    weights = (call.conv1_weight, call.conv2_weight, call.shortcut_weight)
    strides = [weight.stride() for weight in weights if weight is not None]
    return {
        "x": call.x.data_ptr(),
        "skip": address(call.skip),
        "batch": batch,
        "height": height,
        "width": width,
        "x_channels": channels,
        "skip_channels": 0 if call.skip is None else call.skip.shape[1],
        "outputs": len(call.conv1_weight),
        "norm_weight": [call.norm1_weight.data_ptr(), call.norm2_weight.data_ptr()],
        "norm_bias": [call.norm1_bias.data_ptr(), call.norm2_bias.data_ptr()],
        "groups": list(call.groups),
        "eps": list(call.eps),
        "shift": address(call.shift),
        "shift_stride": 0 if call.shift is None else call.shift.stride(0),
        "projection": call.shortcut_weight is not None,
        "weight": [address(weight) for weight in weights],
        "input_step": [stride[1] for stride in strides],
        "tap_step": [stride[3] for stride in strides],
        "bias": [address(call.conv1_bias), address(call.conv2_bias), address(call.shortcut_bias)],
        "transform": transform.data_ptr(),
        "first": first.data_ptr(),
        "second": second.data_ptr(),
        "convolved": convolved.data_ptr(),
        "statistics": statistics.data_ptr(),
        "y": address(y),
    }


def preactivation_block_gradient(grad: Tensor, out: Sequence[Tensor | None]) -> Struct:
    """``kr::PreactivationBlockGradient`` that writes into ``out``, in the order of the call's tensors."""
    grad_x, skip, shift, weight1, bias1, filters1, to1, weight2, bias2, filters2, to2, filters3, to3 = map(address, out)
    return {
        "grad": grad.data_ptr(),
        "grad_x": grad_x,
        "grad_skip": skip,
        "grad_shift": shift,
        "grad_weight": [filters1, filters2, filters3],
        "grad_bias": [to1, to2, to3],
        "grad_norm_weight": [weight1, weight2],
        "grad_norm_bias": [bias1, bias2],
    }
