"""Residual classifiers for small images (He et al., "Deep Residual Learning", CVPR 2016, section 4.2)."""

import torch
from torch import Tensor, nn

from kr_fast.runtime.errors import fail

GROUP_NORM = "-gn"
# Name -> residual blocks in each of the three stages: a network of 6 n + 2 layers. With "-gn" the norms are GroupNorm,
# which mixes no images: what differentially private training asks for (Wu and He, "Group Normalization", ECCV 2018).
CLASSIFIERS = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5}
CLASSIFIERS |= {f"{name}{GROUP_NORM}": blocks for name, blocks in CLASSIFIERS.items()}


def _norm(channels: int, group: bool) -> nn.Module:
    """A BatchNorm; or a GroupNorm of eight groups, or of as many below that as divide the channels."""
    if not group:
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(next(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    The shortcut takes every other pixel first and then convolves with stride 1: the same function as a strided 1x1
    convolution, whose weight gradient oneDNN gets wrong, or writes out of bounds, for fewer channels in channels_last
    than its block holds (oneDNN issue 6035). The norms are called ``bn1`` and ``bn2`` whatever their kind.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, group_norm: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = _norm(outputs, group_norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = _norm(outputs, group_norm)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs, group_norm))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x[:, :, :: self.stride, :: self.stride]))


class ResNet(nn.Module):
    """Stem, three stages of widths (w, 2w, 4w), global average, linear: float ``[N, C, H, W]`` -> logits ``[N, K]``.

    Args:
        blocks: residual blocks in each stage.
        num_classes: ``K``.
        in_channels: ``C``.
        width: ``w``, channels of the first stage.
        stem_stride: of the first convolution.
        group_norm: whether the norms are GroupNorm, and not BatchNorm.
    """

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        stem_stride: int = 1,
        group_norm: bool = False,
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False), _norm(width, group_norm), nn.ReLU()
        )
        stages, inputs = [], width
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range(blocks):
                stages.append(Block(inputs, outputs, 2 if stage > 0 and block == 0 else 1, group_norm))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def classifier(name: str, *, num_classes: int, in_channels: int, width: int = 16, image_size: int = 32) -> ResNet:
    """A fresh classifier by name: resnet8, resnet14 (the paper's Teacher), resnet20 or resnet32.

    With "-gn" behind it, as "resnet14-gn", the norms are GroupNorm: for :func:`kr_fast.privacy.make_private`.

    Above 64 px the stem halves the image first, and above 128 px it quarters it, to keep the cost in bounds.

    Args:
        name: one of ``CLASSIFIERS``.
        num_classes, in_channels, width: as of :class:`ResNet`.
        image_size: the larger side of the images, in pixels.
    Raises: UserError naming the known names.
    """
    if name not in CLASSIFIERS:
        fail("classifier", "name", f"be one of {', '.join(CLASSIFIERS)}", name)
    stride = 1 if image_size <= 64 else 2 if image_size <= 128 else 4
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    return ResNet(CLASSIFIERS[name], **sizes, stem_stride=stride, group_norm=name.endswith(GROUP_NORM))
