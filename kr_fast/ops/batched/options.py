"""What the convolutions of many models are told beside their tensors; kernels read it whole."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Name, scalars and algorithm, as oneDNN writes them.
Activation = tuple[str, tuple[float, ...], str]


class View(NamedTuple):
    """uint8 images as a model sees them: ``x[n, i, j, c] = images[n, rows[i], columns[j], c] * scale[c] + shift[c]``.

    ``rows`` ``[H]`` and ``columns`` ``[W]`` are int32 within the images, which is not checked on a GPU; ``scale`` and
    ``shift`` ``[C]`` are float32. ``x`` is rounded to the weights' dtype; zero padding stands around ``x``.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    shift: Tensor


class ConvOptions(NamedTuple):
    """Vertical and horizontal ``stride``, ``padding`` and ``dilation``; ``config`` is a GPU's tile shape."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation | None = None
    config: int = 0

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Pixels of the output along both axes; below 1 where the kernel does not fit."""
        axes = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]

    def kind(self, channels: int) -> str:
        """ "dense", "depthwise" or "grouped", for ``channels`` inputs."""
        return "dense" if self.groups == 1 else "depthwise" if self.groups == channels else "grouped"
