"""Membership scores, higher for members, from signals of target and shadow models."""

from torch import Tensor

from kr_fast.ops import lira as ops_lira
from kr_fast.runtime.log import logger


def lira(
    phi: Tensor,
    keep: Tensor,
    *,
    variant: str = "online",
    variance: str = "per_example",
    target: Tensor | None = None,
) -> Tensor:
    """Likelihood-ratio attack: scores of every target, float64 ``[M, N]`` (or ``[K, N]`` for outside targets).

    Online: ``ln N(phi; mu_in, s_in) - ln N(phi; mu_out, s_out)``; offline: ``(phi - mu_out) / s_out``, which ranks as
    the one-sided test of the paper does and does not saturate. Averaged over the A queries. ``mu`` is the median of
    the shadows that held (did not hold) the example, as in the authors' code. ``per_example`` variance is the
    population variance of the same shadows; ``fixed`` is one variance for all examples, pooled over the distances
    from each example's own median (better below about 64 shadows). A pair without enough shadows scores 0 and is
    counted in a log line.

    Args:
        phi: ``[A, N, M]`` float, from :func:`kr_fast.ops.membership_signals.membership_signals`.
        keep: ``[M, N]`` bool, True where the example was in the model's training set.
        variant: "online" or "offline".
        variance: "per_example" or "fixed".
        target: ``[A, N, K]`` signals of models outside ``phi``; None scores each of the M models leave-one-out.
    Raises: TypeError or ValueError naming the argument.
    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, algorithm 1, sections V-VI.
    """
    scores, lacking = ops_lira.lira(phi, keep, variant=variant, variance=variance, target=target)
    if lacking:
        logger.warning("lira: %d (target, example) pairs have too few shadows on a side and score 0", lacking)
    return scores
