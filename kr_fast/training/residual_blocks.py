"""Residual blocks of two 3x3 convolutions as one op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kr_fast.backends.arguments import BlockLayers
from kr_fast.ops.nn.residual_block import CHANNELS, dense, inference
from kr_fast.ops.nn.residual_block import unchecked as residual_block
from kr_fast.training.conditions import hooked, is_norm, plain
from kr_fast.training.layout import nhwc


class BlockModules(NamedTuple):
    """What a block is made of, found when it is patched.

    ``layers`` are conv1, bn1, conv2, bn2 and, where the shortcut is a convolution, its two; ``children`` those of the
    block.
    """

    layers: tuple[Any, ...]
    children: tuple[nn.Module | None, ...]
    stride: int


def find(block: Any) -> BlockModules | None:
    """The parts of ``kr_fast.models.resnet.Block`` or torchvision's ``BasicBlock``, None where the op does not fit."""
    ours = hasattr(block, "shortcut")  # which takes every other pixel before the shortcut's convolution
    shortcut = block.shortcut if ours else block.downsample
    layers = [block.conv1, block.bn1, block.conv2, block.bn2]
    projects = type(shortcut) is nn.Sequential and len(shortcut) == 2
    if projects:
        layers += shortcut
    if not all(type(conv) is nn.Conv2d and _square(conv) for conv in layers[::2]) or not all(
        map(is_norm, layers[1::2])
    ):
        return None
    stride = block.conv1.stride
    forms = [((3, 3), stride), ((3, 3), (1, 1)), ((1, 1), (1, 1) if ours else stride)]
    fits = all((conv.kernel_size, conv.stride) == form for conv, form in zip(layers[::2], forms, strict=False))
    identity = shortcut is None or type(shortcut) is nn.Identity
    if not fits or stride not in ((1, 1), (2, 2)) or not (projects or (identity and stride == (1, 1))):
        return None
    if not ours and type(block.relu) is not nn.ReLU:
        return None
    if any("forward" in vars(each) for each in (*layers, *block.children())):
        return None
    return BlockModules(tuple(layers), tuple(block._modules.values()), stride[0])


def _square(conv: nn.Conv2d) -> bool:
    sides = conv.in_channels % CHANNELS == 0 and conv.out_channels % CHANNELS == 0
    padding = ((conv.kernel_size[0] // 2,) * 2, (1, 1), 1, "zeros", None)
    return sides and padding == (conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.bias)


def compute(block: Any, modules: BlockModules, x: Tensor) -> Tensor | None:
    """The block by one op, or None where its modules would not compute the same."""
    layers, children = modules.layers, block._modules.values()
    if any(now is not found for now, found in zip(children, modules.children, strict=False)):
        return None
    watched = (*layers, *(each for each in children if each is not None))
    norms, convolutions = layers[1::2], layers[::2]
    training = norms[0].training
    alike = all(is_norm(norm) and norm.training is training for norm in norms)
    if not plain(x) or hooked(*watched) or not alike:
        return None
    if not training and torch.is_grad_enabled():
        return None  # there is no derivative by running statistics
    if x.numel() == 0 or x.shape[1] != convolutions[0].in_channels:
        return None
    stride = modules.stride
    if training and x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) < 2:
        return None  # BatchNorm has its own error
    weights = [dense(conv.weight) for conv in convolutions]
    learned = [each for norm in norms for each in (norm.weight, norm.bias)]
    if not all(each.dtype == torch.float32 and each.is_cpu for each in (*weights, *learned)):
        return None
    running = [each for norm in norms for each in (norm.running_mean, norm.running_var)]
    eps, momentum = [norm.eps for norm in norms], [norm.momentum for norm in norms]
    block_layers = BlockLayers(weights, learned, stride, eps, running, momentum)
    if not training:
        return inference(nhwc(x), block_layers)
    for norm in norms:
        norm.num_batches_tracked.add_(1)
    return residual_block(nhwc(x), block_layers)
