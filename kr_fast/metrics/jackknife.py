"""The jackknife that leaves out a part at a time: intervals of figures of the pairs of two samples.

One pass over all pairs gives the figures without each part. A bootstrap would draw an image twice, whose nearest
neighbour is then itself: wrong for all figures of neighbours.
"""

import numpy as np
import torch
from torch import Tensor

PARTS = 20


def parts_of(count: int, parts: int, seed: int) -> Tensor:
    """float64 ``[N, G]``, one-hot: N images dealt out by chance to G parts, whose sizes differ by at most one."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return torch.eye(parts, dtype=torch.float64)[order % parts]


def interval(
    value: float,
    without: Tensor,
    *,
    unbiased: bool = False,
    level: float = 0.95,
    bounds: tuple[float, float] = (-float("inf"), float("inf")),
) -> list[float]:
    """``value -+ t sqrt((G - 1) / G sum_g (v_g - mean v)^2)`` with t of G - 1 degrees of freedom, within ``bounds``.

    Args:
        without: float64 ``[G]``, the values ``v_g`` without part g of both samples.
        unbiased: whether it is about ``G value - (G - 1) mean v``, which has a bias of order 1 / N taken out, in place
            of ``value``, which it then need not hold.
    Source: Quenouille, Biometrika 43 (1956); Shao and Tu, "The Jackknife and Bootstrap", 1995, section 2.3.
    """
    from scipy.special import stdtrit

    parts, mean = len(without), float(without.mean())
    centre = parts * value - (parts - 1) * mean if unbiased else value
    error = ((parts - 1) / parts * float((without - mean).square().sum())) ** 0.5
    reach = float(stdtrit(parts - 1, 0.5 + level / 2)) * error
    return [min(max(end, bounds[0]), bounds[1]) for end in (centre - reach, centre + reach)]
