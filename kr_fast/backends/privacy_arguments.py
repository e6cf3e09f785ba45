"""The checked arguments of the family ``privacy``, as :mod:`.arguments` has the other ops'.

``multiplicity`` consecutive rows of the batch belong to one record. The fields are in the order of the op's schema.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def accumulated(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and results: float32, or float64 where one of ``tensors`` is."""
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


class Gradients(Protocol):
    """Any of the classes below."""

    @property
    def grad_output(self) -> Tensor: ...

    @property
    def multiplicity(self) -> int: ...


def records(call: Gradients) -> int:
    """``B`` of ``R = B K`` rows."""
    return call.grad_output.shape[0] // call.multiplicity


class ConvGradients(NamedTuple):
    """Of conv2d_grad_norms and conv2d_grad_samples; pairs are vertical and horizontal.

    ``padding`` is what lies above and left of the image; what lies below and right follows from ``grad_output``.
    """

    x: Tensor
    grad_output: Tensor
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool
    multiplicity: int

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.grad_output.shape[1], self.x.shape[1] // self.groups, *self.kernel_size

    def padded(self) -> tuple[int, int]:
        """Rows and columns of the padded image that a tap reads."""
        axes = zip(self.grad_output.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        rows, columns = ((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in axes)
        return rows, columns


class LinearGradients(NamedTuple):
    """Of linear_grad_norms and linear_grad_samples: ``x`` ``[R, T, I]``, ``grad_output`` ``[R, T, O]``."""

    x: Tensor
    grad_output: Tensor
    bias: bool
    multiplicity: int


class EmbeddingGradients(NamedTuple):
    """Of embedding_grad_norms: ``indices`` ``[R, T]`` int64, ``grad_output`` ``[R, T, D]``."""

    indices: Tensor
    grad_output: Tensor
    padding_idx: int | None
    multiplicity: int


class GroupNormGradients(NamedTuple):
    """Of group_norm_grad_norms: both ``[R, C, *]``."""

    x: Tensor
    grad_output: Tensor
    groups: int
    eps: float
    multiplicity: int


class LayerNormGradients(NamedTuple):
    """Of layer_norm_grad_norms: both ``[R, T, D]``, normalised over D."""

    x: Tensor
    grad_output: Tensor
    eps: float
    bias: bool
    multiplicity: int
