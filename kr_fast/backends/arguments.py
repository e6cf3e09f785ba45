"""The checked arguments of ops that have many, as one object that goes whole from the op to a backend's kernel.

The fields are in the order of the op's schema in ``torch.library``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class LossOptions(NamedTuple):
    """Of the distillation losses: how a loss is formed of its tensors."""

    temperature: float = 1.0
    target_type: str = "logits"  # of codes.TARGET_KINDS; with "topk_smooth" and "topk_renorm" there are indices
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"  # or "sum" or "none"
    divergence: str = "kl"  # of codes.DIVERGENCES: also "cross" (-p ln q) and "decoupled" (dkd_loss)
    alpha: float = 0.0  # of "decoupled" alone, as is beta
    beta: float = 0.0

    def changed(self, **values: Any) -> "LossOptions":
        """``_replace``, into which ``torch.compile`` of torch 2.6 does not follow."""
        return LossOptions(*(values.get(name, self[at]) for at, name in enumerate(_LOSS_OPTIONS)))


_LOSS_OPTIONS = LossOptions._fields


class SolverRow(NamedTuple):
    """The coefficients of one step; see :func:`kr_fast.solver_step` for the formula."""

    x0_sample: float = 0.0
    x0_model: float = 0.0
    clip: float = float("inf")
    sample: float = 0.0
    model: float = 0.0
    x0: float = 0.0
    noise: float = 0.0
    next_input: float = 1.0
    history: tuple[float, ...] = ()
    quantile: float = 0.0
    keep: tuple[float, float, float] | None = None

    def numbers(self) -> list[float]:
        """What kernels read, in the order of ``kr::solver_row``: 8 coefficients, ``keep``, ``history``."""
        return [*list(self)[:8], *(self.keep or (0.0, 0.0, 0.0)), *self.history]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> "SolverRow":
        """The row of :meth:`numbers`, but for ``quantile``, of which limits have been made."""
        return cls(*numbers[:8], history=tuple(numbers[11:]), keep=tuple(numbers[8:11]))

    def needs_clean(self, kept: bool) -> bool:
        """Whether a step reads the clamped clean image, for itself or for what it keeps."""
        return self.x0 != 0 or (kept and self.keep is not None and self.keep[2] != 0)


class SolverOutput(NamedTuple):
    """What :func:`kr_fast.solver_step` was asked to emit; the rest is None."""

    sample: Tensor | None = None
    kept: Tensor | None = None
    input: Tensor | None = None
    image: Tensor | None = None


class SolverStep(NamedTuple):
    """Of solver_step; ``out`` holds the tensors to write into."""

    sample: Tensor
    model_output: Tensor
    uncond_output: Tensor | None
    ids: Tensor | None
    limits: Tensor | None
    history: list[Tensor]
    row: SolverRow
    guidance: float
    seed: int
    stream: int
    copies: int
    out: SolverOutput


class SolverTableStep(NamedTuple):
    """Of solver_step_at: row ``step`` of ``rows``, from and to the rings' slots that ``slots`` names."""

    step: Tensor
    rows: Tensor
    slots: Tensor
    samples: Tensor
    kept: Tensor
    model_output: Tensor
    uncond_output: Tensor | None
    ids: Tensor | None
    limits: Tensor | None
    guidance: float
    seed: int
    stream: int
    copies: int
    input: Tensor | None
    image: Tensor | None


Step = TypeVar("Step", SolverStep, SolverTableStep)


def in_one_layout(step: Step) -> tuple[Step, bool]:
    """The step with both of the network's outputs contiguous or, which comes second, channels_last."""
    cond, uncond = step.model_output, step.uncond_output
    last = cond.ndim == 4 and not cond.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    uncond = None if uncond is None else uncond.contiguous(memory_format=layout)
    return step._replace(model_output=cond.contiguous(memory_format=layout), uncond_output=uncond), last


class GroupNorm(NamedTuple):
    """Of group_norm_silu."""

    x: Tensor
    skip: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float
    silu: bool


class GroupNormGradient(NamedTuple):
    """Of the gradient of group_norm_silu: what its forward was given and kept; ``mean``, ``rstd`` ``[N, groups]``."""

    grad: Tensor
    x: Tensor
    skip: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    groups: int
    silu: bool


class BatchNormAct(NamedTuple):
    """Of batch_norm_act."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
    eps: float


class BatchNormActGradient(NamedTuple):
    """Of the gradient of batch_norm_act.

    ``y`` is None where no sign is needed or ``x`` tells it: without ReLU, or without a residual before it. ``passes``
    says whether the gradient behind the ReLU is asked for, as that of the residual.
    """

    grad: Tensor
    x: Tensor
    y: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    relu: bool
    passes: bool
    eps: float


class DirectConv(NamedTuple):
    """Of direct_conv2d; pairs are vertical and horizontal."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]


class DirectConvGradient(NamedTuple):
    """Of the gradient of direct_conv2d, and which of its inputs are asked for."""

    grad_output: Tensor
    x: Tensor
    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    by_x: bool
    by_weight: bool
    by_bias: bool


class BlockLayers(NamedTuple):
    """Of residual_block, a list element for each of conv1, conv2 and, if it is a convolution, the shortcut.

    ``norms`` holds weight and bias of each, ``running`` its running mean and variance, which a kernel updates; empty
    where there are none. Weights are contiguous or channels_last.
    """

    weights: Sequence[Tensor]
    norms: Sequence[Tensor | None]
    stride: int
    eps: Sequence[float]
    running: Sequence[Tensor | None] = ()
    momentum: Sequence[float] = ()


class BlockState(NamedTuple):
    """Of residual_block: what its forward keeps for backward.

    ``convolved`` ``[layers, N, H', W', O]`` stands before the norms; ``statistics`` ``[layers, 2, O]`` are mean and
    biased variance; ``positive`` uint8 ``[N, H', W', O / 8]`` has a bit for each number that passed the last ReLU.
    """

    convolved: Tensor
    statistics: Tensor
    positive: Tensor


class PreactivationBlock(NamedTuple):
    """Of preactivation_block; ``groups`` and ``eps`` are of the two norms."""

    x: Tensor
    skip: Tensor | None
    shift: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor | None
    shortcut_weight: Tensor | None
    shortcut_bias: Tensor | None
    groups: Sequence[int]
    eps: Sequence[float]


class WinogradConv(NamedTuple):
    """Of winograd_conv2d."""

    x: Tensor
    weight: Tensor
    outputs: int
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: str | None
    pool: bool


class WinogradGradWeight(NamedTuple):
    """Of winograd_conv2d_grad_weight: what it reads, and what it writes into."""

    x: Tensor
    grad_output: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


class SGDRule(NamedTuple):
    """Of optimizer_step: a group's hyperparameters as in ``torch.optim.SGD`` without dampening."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


class AdamWRule(NamedTuple):
    """Of optimizer_step: a group's hyperparameters as in ``torch.optim.AdamW``."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2


class OptimizerTensors(NamedTuple):
    """Of optimizer_step, an element for each parameter; None where there is no such tensor."""

    parameters: list[Tensor]
    groups: list[int]
    first: list[Tensor | None]
    second: list[Tensor | None]
    steps: list[Tensor | None]
    averages: list[Tensor | None]


class OptimizerStep(NamedTuple):
    """Of optimizer_step: what a kernel is given; ``table`` and ``addresses`` (of gradients, 0: none) are for C++."""

    tensors: OptimizerTensors
    table: Tensor
    grads: list[Tensor | None]
    addresses: list[int]
    rules: Sequence[SGDRule] | Sequence[AdamWRule]
    max_norm: float
    average_weight: float


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
    """Of model_conv2d and its backward; pairs are vertical and horizontal, ``config`` is a GPU's tile shape."""

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


class ModelResidualBlock(NamedTuple):
    """Of model_residual_block."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    relu: bool


class BatchNorm(NamedTuple):
    """Of model_batch_norm."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
    eps: float


class BatchNormGradient(NamedTuple):
    """Of model_batch_norm's backward: what its forward was given and made, ``y`` with a ReLU alone."""

    grad: Tensor
    x: Tensor
    y: Tensor | None
    weight: Tensor | None
    mean: Tensor
    var: Tensor
    relu: bool
    residual: bool  # whether its gradient is asked for, which is grad without a ReLU
    eps: float


class Sgd(NamedTuple):
    """Of model_sgd."""

    weight: Tensor
    velocity: Tensor
    grad: Tensor
    rate: Tensor
    momentum: Tensor
    sizes: tuple[int, ...]
    decays: tuple[float, ...]
