"""Standard augmentation, batched: one affine resampling for the whole batch, each image with its own parameters."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random shift, flip, rotation and scale; everything off by default.

    Args:
        shift: largest shift in pixels, drawn per image and axis (whole pixels if it is the only one besides ``flip``,
            which is the usual random crop with replicated border; any fraction otherwise).
        flip: mirror half of the images left-right.
        rotate: largest angle in degrees.
        scale: largest relative change of size.
    """

    shift: int = 0
    flip: bool = False
    rotate: float = 0.0
    scale: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``images``: float ``[N, C, H, W]`` -> the same shape. ``generator`` is a CPU generator."""
        count, device = len(images), images.device
        if self.flip:
            mirrored = torch.rand(count, generator=generator).to(device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.rotate or self.scale:
            return self._affine(images, generator)
        if self.shift:
            moves = torch.randint(-self.shift, self.shift + 1, (2, count, 1), generator=generator).to(device)
            height, width = images.shape[2:]
            rows = (torch.arange(height, device=device) + moves[0]).clamp_(0, height - 1)
            columns = (torch.arange(width, device=device) + moves[1]).clamp_(0, width - 1)
            index = torch.arange(count, device=device)[:, None, None]
            picked = images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
            images = picked.permute(0, 3, 1, 2)
        return images

    def _affine(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        draw = torch.rand(4, count, generator=generator).mul_(2).sub_(1)
        angle = draw[0] * (self.rotate * math.pi / 180)
        size = 1 + draw[1] * self.scale
        matrix = torch.zeros(count, 2, 3)
        matrix[:, 0, 0] = matrix[:, 1, 1] = size * angle.cos()
        matrix[:, 1, 0] = size * angle.sin()
        matrix[:, 0, 1] = -matrix[:, 1, 0]
        matrix[:, 0, 2] = draw[2] * (2 * self.shift / width)
        matrix[:, 1, 2] = draw[3] * (2 * self.shift / height)
        grid = torch.nn.functional.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
        return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
