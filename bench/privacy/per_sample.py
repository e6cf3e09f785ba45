"""What the benchmarks of this family share: layers, and how others come by per-sample gradients.

The layers are those of ResNet-14 (width 16) and of a UNet (32, 64, 64) at 28 px, in batches of 64, and layers in groups
as of MobileNet and ResNeXt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 64
# Name -> inputs, outputs, side of the image, kernel, stride and, if not 1, groups.
CONVOLUTIONS = {
    "resnet stem": (1, 16, 28, 3, 1),
    "resnet 1": (16, 16, 28, 3, 1),
    "resnet 2 down": (16, 32, 28, 3, 2),
    "resnet 2 shortcut": (16, 32, 28, 1, 2),
    "resnet 2": (32, 32, 14, 3, 1),
    "resnet 3 down": (32, 64, 14, 3, 2),
    "resnet 3 shortcut": (32, 64, 14, 1, 2),
    "resnet 3": (64, 64, 7, 3, 1),
    "unet 1": (32, 32, 28, 3, 1),
    "unet 2": (64, 64, 14, 3, 1),
    "unet 3": (64, 64, 7, 3, 1),
    "unet up 3": (128, 64, 7, 3, 1),
    "unet up 2 shortcut": (128, 64, 14, 1, 1),
    "depthwise 1": (32, 32, 28, 3, 1, 32),
    "depthwise 2 down": (64, 64, 28, 3, 2, 64),
    "depthwise 2": (128, 128, 14, 3, 1, 128),
    "depthwise 2, 5x5": (96, 96, 14, 5, 1, 96),
    "depthwise 3": (256, 256, 7, 3, 1, 256),
    "groups of 4": (128, 128, 14, 3, 1, 32),
    "groups of 16": (64, 64, 14, 3, 1, 4),
}
# Leading shape, I, O: the head of a classifier, time embeddings, tokens of attention at 7 px.
LINEAR = {"head": ((64,), 64, 10), "embedding": ((64,), 128, 128), "attention": ((64, 49), 64, 192)}
LAST = torch.channels_last


def convolution(name: str) -> tuple[Tensor, Tensor, dict]:
    """x and grad_output in channels_last, and the layer's options."""
    inputs, outputs, side, kernel, stride, *rest = CONVOLUTIONS[name]
    options = {"stride": stride, "padding": kernel // 2, "groups": rest[0] if rest else 1}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, inputs, side, side, generator=generator).relu()
    y = F.conv2d(x, torch.zeros(outputs, inputs // options["groups"], kernel, kernel), **options)
    grad_output = torch.randn(y.shape, generator=generator)
    return x.contiguous(memory_format=LAST), grad_output.contiguous(memory_format=LAST), options


def grad_weight(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int, groups: int = 1) -> Tensor:
    """Torch's own gradient, summed over the batch: as many operations as the norms take."""
    weight = x.new_empty(grad_output.shape[1], x.shape[1] // groups, kernel, kernel)
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups
    return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *geometry, [False, True, False])[1]


def unfolded(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int, groups: int = 1) -> Tensor:
    """Per-sample gradients as Opacus takes them (grad_sample/conv.py): unfold, then einsum."""
    taps = F.unfold(x, kernel, padding=padding, stride=stride)
    by_group = (each.reshape(len(x), groups, each.shape[1] // groups, -1) for each in (grad_output, taps))
    return torch.einsum("ngoq,ngpq->ngop", *by_group).flatten(1, 2)


def looped(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int, groups: int = 1) -> Tensor:
    """Per-sample gradients by a torch call for each record."""
    pairs = zip(x.split(1), grad_output.split(1), strict=True)
    return torch.stack([grad_weight(*pair, kernel, stride, padding, groups) for pair in pairs])


def norms(samples: Tensor) -> Tensor:
    return samples.flatten(1).norm(dim=1)


def check(found: Tensor, wanted: Tensor) -> float:
    """The largest error beside the largest number, which is small enough to start the clock."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5, error
    return error
