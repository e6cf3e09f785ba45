"""Clip factors: by how much each record's gradient is scaled, so that none is longer than the bound."""

from collections.abc import Callable

import torch
from torch import Tensor

# Of automatic clipping: what keeps small gradients small (Bu et al., 2023, section 4.2).
GAMMA = 0.01
# Norms are sums in float32, with relative errors of some 1e-7: so much below the bound is aimed at.
MARGIN = 1 - 2.0**-20


def flat(norms: Tensor, bound: float) -> Tensor:
    """``min(1, C / |g_b|)``: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1."""
    return (MARGIN * bound / norms).clamp_(max=1)


def automatic(norms: Tensor, bound: float) -> Tensor:
    """``C / (|g_b| + gamma)``: Bu et al., "Automatic Clipping", NeurIPS 2023, eq. 4, AUTO-S.

    The bound then only scales the learning rate.
    """
    return MARGIN * bound / (norms + GAMMA)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"flat": flat, "automatic": automatic}


def factors(rule: str, squares: Tensor, bound: float, present: Tensor) -> tuple[Tensor, Tensor]:
    """(clip factors ``[B]``, which records have gradients that are not finite ``[B]``).

    Absent records have the factor 0, as have those whose norm is not a number or does not fit float32.

    Args:
        squares: float32 ``[B]``, of the norms.
    """
    norms = squares.sqrt()
    finite = torch.isfinite(norms)
    scale = RULES[rule](norms, bound)
    return torch.where(present & finite, scale, torch.zeros_like(scale)), ~finite
