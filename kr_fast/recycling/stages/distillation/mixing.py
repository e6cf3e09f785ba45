"""Mixtures of pairs of synthetic images: MixUp and CutMix, by batches.

Image i of a batch of B is mixed with image B - 1 - i; as batches are shuffled, pairs are random.
"""

import dataclasses

import numpy as np
from torch import Tensor

from kr_fast.runtime import seeds


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How the images of a batch are mixed: ``share`` is what each keeps of itself.

    ``box``: (top, bottom, left, right) of the pixels that come from the other image (CutMix), bottom and right
    excluded; None where every pixel is mixed (MixUp).
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    def images(self, x: Tensor) -> Tensor:
        """``share x_i + (1 - share) x_j``, or ``x_i`` with the box of ``x_j``; ``x``: ``[B, C, H, W]``, unchanged."""
        if self.box is None:
            return self.share * x + (1 - self.share) * x.flip(0)
        top, bottom, left, right = self.box
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
        return mixed


def draw_mixtures(
    mixup: float, cutmix: float, steps: int, size: tuple[int, int], seed: int, *names: object
) -> list[Mixture | None]:
    """The mixture of each step of an epoch, a function of (seed, names): all None where both are 0.

    With both, a fair coin decides for each step which one it is. ``lambda ~ Beta(alpha, alpha)`` is MixUp's share; in
    CutMix the box has the sides ``sqrt(1 - lambda)`` times those of the image, its centre is uniform over the pixels,
    and the share is what is left of the area after the box was cut off at the image's border.

    Args:
        mixup, cutmix: their alpha; 0 for none. size: (height, width) of an image.
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix: Regularization
        Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019, equations 1 and 2.
    """
    if not mixup and not cutmix:
        return [None] * steps
    random = np.random.default_rng(seeds.derive(seed, *names))
    mixtures: list[Mixture | None] = []
    for _ in range(steps):
        cut = random.random() < 0.5 if mixup and cutmix else bool(cutmix)
        share = float(random.beta(*[cutmix if cut else mixup] * 2))
        mixtures.append(_cut(share, size, random) if cut else Mixture(share))
    return mixtures


def _cut(share: float, size: tuple[int, int], random: np.random.Generator) -> Mixture:
    """A box of about ``1 - share`` of the image."""
    box, area = [], 1
    for side in size:
        length, centre = int(side * (1 - share) ** 0.5), int(random.integers(side))
        first, last = max(centre - length // 2, 0), min(centre - length // 2 + length, side)
        box += [first, last]
        area *= last - first
    return Mixture(1 - area / (size[0] * size[1]), tuple(box))
