"""Decoupled knowledge distillation from raw logits, on the kernels of the distillation loss."""

from torch import Tensor

from kr_fast.ops.distillation.autograd import apply, apply_standardized
from kr_fast.ops.distillation.checks import loss_options, loss_tensors


def dkd_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled knowledge distillation of student logits against teacher logits.

    With ``q = softmax(z / T)``, ``p = softmax(t / T)``, label ``y``, and hats for the softmax over the classes but y:
    ``l_i = w_i (T^2 (alpha KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta KL(p^ || q^)) + hard_weight CE(z_i, y_i))``.
    ``alpha = 1`` and ``beta = 1 - p_y`` would be :func:`distillation_loss`. The label is taken out of the sums, so that
    ``1 - q_y`` keeps its digits where the student is sure; both divergences are summed by non-negative terms.

    Args:
        input, target: student and teacher logits, ``[N, C]``, C >= 2, as for :func:`distillation_loss`.
        labels: ``[N]`` integers in [0, C), or ``ignore_index`` for a row that does not count.
        alpha, beta: >= 0, weights of the target-class and of the non-target-class divergence.
        temperature, hard_weight, ignore_index, sample_weight, standardize, reduction: as for :func:`distillation_loss`.
    Returns, Raises: as :func:`distillation_loss`.
    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equations 5 to 7, with T^2 as in their code.
    """
    op = "dkd_loss"
    numbers = {"alpha": alpha, "beta": beta, "hard_weight": hard_weight, "ignore_index": ignore_index}
    options = loss_options(op, temperature, divergence="decoupled", reduction=reduction, **numbers)
    tensors = loss_tensors(op, input, target, labels, sample_weight, options)
    return (apply_standardized if standardize else apply)(*tensors, options)
