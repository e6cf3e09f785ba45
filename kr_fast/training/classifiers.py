"""The forwards that ``kr_fast.optimize(model, training=True)`` gives to classifiers of convolutions and BatchNorm.

Each takes the module whose forward it replaces and computes what that computes, with the gradient. Under bfloat16
autocast convolutions and products are torch's in channels_last and the norms are fused. Whatever a fused op does not
take (another dtype or device, a frozen BatchNorm, a hook on a module inside) is computed by the modules themselves,
call by call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.backends.cpu.nn import FEWEST_IMAGES, direct_trains_faster, winograd_is_faster, winograd_trains_faster
from kr_fast.ops.nn.batch_norm_act import batch_norm_act
from kr_fast.ops.nn.direct_conv2d import direct_conv2d
from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d
from kr_fast.training import residual_blocks
from kr_fast.training.conditions import hooked, is_norm, mixed, plain
from kr_fast.training.layout import nhwc
from kr_fast.training.patches import Patches
from kr_fast.training.residual_blocks import BlockModules


def conv(self: Any, input: Tensor) -> Tensor:
    """A ``Conv2d`` in channels_last, by the definition where that is faster than the library."""
    if input.ndim != 4:  # one image
        return nn.Conv2d.forward(self, input)
    if plain(input) and direct_trains_faster(self, input.shape):
        return direct_conv2d(nhwc(input), self.weight, bias=self.bias, stride=self.stride, padding=self.padding)
    return self._conv_forward(nhwc(input) if plain(input) or mixed(input) else input, self.weight, self.bias)


def linear(self: Any, input: Tensor) -> Tensor:
    """A ``Linear`` as a 1x1 convolution: its weight gradient has the same bits for any number of threads."""
    if input.ndim != 2 or len(input) < FEWEST_IMAGES or not plain(input):
        return nn.Linear.forward(self, input)
    return direct_conv2d(input.contiguous()[:, :, None, None], self.weight[:, :, None, None], bias=self.bias).flatten(1)


def conv3x3(self: Any, input: Tensor) -> Tensor:
    """A ``Conv2d`` of 3x3, stride 1 and padding 1, by Winograd's algorithm where that is faster."""
    if input.ndim == 4 and plain(input) and winograd_trains_faster(input.shape, self.out_channels):
        return winograd_conv2d(nhwc(input), self.weight, bias=self.bias)
    return conv(self, input)


def norm_act(norm: Any, x: Tensor, activation: Callable | None = None, residual: Tensor | None = None) -> Tensor:
    """``activation(norm(x) + residual)``, one op by a batch's statistics where ``activation`` is a ReLU or None."""
    modules = (norm, activation) if isinstance(activation, nn.Module) else (norm,)
    alike = residual is None or residual.dtype == x.dtype
    rectifies = activation is None or activation is torch.relu or type(activation) is nn.ReLU
    fits = is_norm(norm) and norm.training and alike and rectifies
    if fits and (plain(x) or mixed(x)) and not hooked(*modules):
        return _batch_norm_act(norm, x, activation, residual)
    y = norm(x)
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


def _batch_norm_act(norm: Any, x: Tensor, activation: Callable | None, residual: Tensor | None) -> Tensor:
    norm.num_batches_tracked.add_(1)
    return batch_norm_act(
        nhwc(x),
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        residual=None if residual is None else nhwc(residual),
        momentum=norm.momentum,
        eps=norm.eps,
        activation=None if activation is None else "relu",
    )


def batch_norm(self: Any, input: Tensor) -> Tensor:
    """A ``BatchNorm2d`` that nothing follows."""
    if is_norm(self) and self.training and (plain(input) or mixed(input)):
        return _batch_norm_act(self, input, None, None)
    return nn.BatchNorm2d.forward(self, input)


def sequential(self: Any, input: Tensor) -> Tensor:
    """A ``Sequential``: a ReLU that follows a BatchNorm is part of it."""
    modules = list(self)
    for index, module in enumerate(modules):
        before = modules[index - 1] if index else None
        following = modules[index + 1] if index + 1 < len(modules) else None
        if is_norm(module) and type(following) is nn.ReLU:
            input = norm_act(module, input, following)
        elif not (type(module) is nn.ReLU and is_norm(before)):
            input = module(input)
    return input


def strided(x: Tensor, stride: int) -> Tensor:
    """``x[:, :, ::stride, ::stride]`` of channels_last, and so its gradient, which that slice would get in NCHW."""
    return x if stride == 1 else x.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2)


def block(self: Any, x: Tensor, *, modules: BlockModules | None = None) -> Tensor:
    """:class:`kr_fast.models.resnet.Block`, one op where it is made of ``modules``."""
    if modules is not None and (y := residual_blocks.compute(self, modules, x)) is not None:
        return y
    y = norm_act(self.bn1, self.conv1(x), torch.relu)
    return norm_act(self.bn2, self.conv2(y), torch.relu, self.shortcut(strided(x, self.stride)))


def basic_block(self: Any, x: Tensor, *, modules: BlockModules | None = None) -> Tensor:
    """torchvision's ``BasicBlock``, one op where it is made of ``modules``."""
    if modules is not None and (y := residual_blocks.compute(self, modules, x)) is not None:
        return y
    y = norm_act(self.bn1, self.conv1(x), self.relu)
    return norm_act(self.bn2, self.conv2(y), self.relu, x if self.downsample is None else self.downsample(x))


def bottleneck(self: Any, x: Tensor) -> Tensor:
    """torchvision's ``Bottleneck``."""
    y = norm_act(self.bn1, self.conv1(x), self.relu)
    y = norm_act(self.bn2, self.conv2(y), self.relu)
    return norm_act(self.bn3, self.conv3(y), self.relu, x if self.downsample is None else self.downsample(x))


def resnet(self: Any, x: Tensor) -> Tensor:
    """torchvision's ``ResNet``."""
    x = self.maxpool(norm_act(self.bn1, self.conv1(x), self.relu))
    for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
        x = layer(x)
    return self.fc(torch.flatten(self.avgpool(x), 1))


# By qualified name: torchvision is not imported.
_BLOCKS = {
    "kr_fast.models.resnet.Block": block,
    "torchvision.models.resnet.BasicBlock": basic_block,
    "torchvision.models.resnet.Bottleneck": bottleneck,
    "torchvision.models.resnet.ResNet": resnet,
}


def fuse(patches: Patches, model: nn.Module) -> None:
    """Patch what is fused of ``model``: convolutions, BatchNorm, and the blocks that hold them."""
    convolutional = any(type(module) is nn.Conv2d for module in model.modules())
    for module in list(model.modules()):
        kind = type(module)
        forward = _BLOCKS.get(f"{kind.__module__}.{kind.__qualname__}")
        if "forward" in vars(module):
            continue  # of the user's own
        if forward is not None and all(
            is_norm(norm) for name, norm in vars(module)["_modules"].items() if name[:2] == "bn"
        ):
            fused = forward in (block, basic_block) and residual_blocks.find(module)
            patches.forward(module, functools.partial(forward, modules=fused) if fused else forward)
        elif kind is nn.Conv2d:
            patches.channels_last(module.weight)
            fits = winograd_is_faster(module, module.stride, module.padding)
            patches.forward(module, conv3x3 if fits else conv)
        elif kind is nn.Linear and convolutional:
            patches.forward(module, linear)
        elif kind is nn.Sequential and any(is_norm(each) for each in module):
            patches.forward(module, sequential)
        elif is_norm(module):
            patches.forward(module, batch_norm)
