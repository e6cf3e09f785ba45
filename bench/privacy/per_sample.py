"""What the benchmarks of this family share: layers, and how others come by per-sample gradients.

The layers are those of ResNet-14 (width 16) and of a UNet (32, 64, 64) at 28 px, in batches of 64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 64
# Name -> inputs, outputs, side of the image, kernel, stride.
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
}
# Leading shape, I, O: the head of a classifier, time embeddings, tokens of attention at 7 px.
LINEAR = {"head": ((64,), 64, 10), "embedding": ((64,), 128, 128), "attention": ((64, 49), 64, 192)}
LAST = torch.channels_last


def convolution(name: str) -> tuple[Tensor, Tensor, dict]:
    """x and grad_output in channels_last, and the layer's options."""
    inputs, outputs, side, kernel, stride = CONVOLUTIONS[name]
    options = {"stride": stride, "padding": kernel // 2}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, inputs, side, side, generator=generator).relu()
    y = F.conv2d(x, torch.zeros(outputs, inputs, kernel, kernel), **options)
    grad_output = torch.randn(y.shape, generator=generator)
    return x.contiguous(memory_format=LAST), grad_output.contiguous(memory_format=LAST), options


def grad_weight(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Torch's own gradient, summed over the batch: as many operations as the norms take."""
    weight = x.new_empty(grad_output.shape[1], x.shape[1], kernel, kernel)
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *geometry, [False, True, False])[1]


def unfolded(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Per-sample gradients as Opacus takes them (grad_sample/conv.py): unfold, then einsum."""
    taps = F.unfold(x, kernel, padding=padding, stride=stride)
    return torch.einsum("noq,npq->nop", grad_output.reshape(*grad_output.shape[:2], -1), taps)


def looped(x: Tensor, grad_output: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Per-sample gradients by a torch call for each record."""
    pairs = zip(x.split(1), grad_output.split(1), strict=True)
    return torch.stack([grad_weight(*pair, kernel, stride, padding) for pair in pairs])


def norms(samples: Tensor) -> Tensor:
    return samples.flatten(1).norm(dim=1)


def check(found: Tensor, wanted: Tensor) -> float:
    """The largest error beside the largest number, which is small enough to start the clock."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5, error
    return error
