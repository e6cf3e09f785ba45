"""Per-sample gradients by autograd in float64, one record after the other: what the ops of ``privacy`` are held to.

With the convolutions on which the norms and the gradients are tested.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backends import Backend
from torch import Tensor


def gradients(
    layer: Callable[..., Tensor], parameters: Sequence[Tensor], x: Tensor, grad_output: Tensor, multiplicity: int = 1
) -> list[Tensor]:
    """Of ``layer(x, *parameters)``: ``[B, *shape]`` for each parameter, whose values do not matter."""
    x = x.double() if x.is_floating_point() else x
    leaves = [each.double().requires_grad_() for each in parameters]
    found = []
    for rows in range(0, len(x), multiplicity):
        part = slice(rows, rows + multiplicity)
        found.append(torch.autograd.grad(layer(x[part], *leaves), leaves, grad_output[part].double()))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def norms(*arguments: object, **options: object) -> Tensor:
    """Of all parameters together, as :func:`gradients` takes its arguments."""
    return sum(each.flatten(1).square().sum(1) for each in gradients(*arguments, **options)).sqrt()


class Conv(NamedTuple):
    """A layer, its input and why it is there."""

    rows: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = False
    multiplicity: int = 1

    def options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups", "bias", "multiplicity")
        return {name: getattr(self, name) for name in names}

    def parameters(self) -> list[Tensor]:
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        weight = torch.zeros(self.outputs, self.channels // self.groups, *kernel)
        return [weight, torch.zeros(self.outputs)][: 1 + self.bias]

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def draw(self) -> tuple[Tensor, Tensor]:
        """x, of a mean that is not 0, and grad_output."""
        generator = torch.Generator().manual_seed(sum(map(hash, self[:3])))
        x = torch.randn(self.rows, self.channels, *self.size, generator=generator) + 0.5
        y = self.layer(x, self.parameters()[0])
        return x, torch.randn(y.shape, generator=generator)


CONVOLUTIONS = {
    "one value": Conv(1, 1, 1, (1, 1), 1, padding=0),
    "first layer": Conv(3, 1, 16, (12, 12)),
    "stage": Conv(2, 16, 16, (9, 10)),
    "many pixels": Conv(2, 16, 24, (30, 27), bias=True),  # Winograd's form
    "many pixels, two parts": Conv(1, 80, 16, (28, 28)),  # of it: 64 channels and 16, or 32, 32 and 16
    "many pixels, parts of both": Conv(1, 36, 40, (30, 28), bias=True),
    "wide": Conv(2, 70, 35, (7, 7), bias=True),  # no multiple of any vector or tile
    "few pixels": Conv(3, 40, 48, (2, 2), bias=True),  # the Gram form is cheaper
    "few pixels, stride": Conv(2, 64, 64, (6, 7), 3, 2),
    "few pixels, dilation": Conv(2, 64, 64, (7, 6), (3, 2), padding=(2, 1), dilation=(2, 1)),
    "one pixel": Conv(3, 48, 40, (1, 1), 1, padding=0, bias=True),
    "shortcut": Conv(3, 16, 32, (8, 8), 1, 2, 0),
    "downsampling": Conv(2, 8, 24, (9, 8), 3, 2, bias=True),
    "unequal": Conv(2, 3, 5, (11, 6), (5, 2), (3, 1), (0, 2), (2, 3), bias=True),
    "same": Conv(2, 4, 6, (7, 6), (5, 3), padding="same", dilation=(1, 2)),
    "same, more below": Conv(2, 6, 5, (7, 6), (4, 3), padding="same", bias=True),
    "windows apart": Conv(2, 3, 4, (9, 9), 1, 3, 0),
    "padding beyond the kernel": Conv(2, 3, 4, (3, 3), 2, 2, 4),
    "groups": Conv(2, 12, 8, (6, 6), groups=4, bias=True),
    "groups, wide": Conv(2, 10, 68, (5, 5), groups=2, bias=True),  # gathered
    "groups, many pixels": Conv(2, 20, 12, (33, 31), 3, 2, groups=2),  # bands; ten inputs
    "depthwise": Conv(2, 24, 24, (6, 6), groups=24),
    "depthwise, many pixels": Conv(2, 13, 13, (40, 37), 5, groups=13, bias=True),  # two rows of five taps, and one
    "depthwise, dilation": Conv(2, 9, 9, (8, 7), 3, (1, 2), 2, (2, 1), groups=9, multiplicity=2),
    "depthwise, unequal": Conv(2, 18, 18, (9, 8), (2, 7), (2, 1), (1, 3), groups=18),
    "depthwise, two outputs": Conv(2, 6, 12, (6, 6), groups=6, bias=True),
    "multiplicity": Conv(6, 5, 7, (6, 6), bias=True, multiplicity=3),
    "multiplicity, many pixels": Conv(4, 16, 16, (24, 24), bias=True, multiplicity=2),
    "multiplicity, few pixels": Conv(4, 32, 48, (2, 2), bias=True, multiplicity=2),
    "multiplicity, groups": Conv(4, 8, 8, (5, 5), groups=2, multiplicity=4),
}


def skip_slow(backend: Backend, name: str) -> None:
    """Many pixels are a regime of C++, and minutes in Triton's interpreter."""
    if backend.id == "triton-interpreter" and "many pixels" in name:
        pytest.skip("many pixels in the interpreter")
