"""Images as models see them: a query's view, and bytes scaled to numbers."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends.arguments import View
from kr_fast.ensemble.inference.queries import Query


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """``(x / 255 - mean) / std`` on ``device`` with ``normalize = (mean, std)``, or ``x / 127.5 - 1`` with None."""

    normalize: tuple[float | Sequence[float], float | Sequence[float]] | None
    device: torch.device

    def batch(self, images: Tensor, query: Query, size: int, dtype: torch.dtype) -> Tensor:
        """One query of uint8 ``images`` ``[N, H, W, C]``: ``[size, C, h, w]``, channels_last, padded with zeros."""
        images = images.to(self.device)
        index = query.index(*images.shape[1:3])
        if index is not None:
            rows, columns = (each.to(self.device) for each in index)
            images = images[:, rows[:, None], columns]
        x = torch.zeros(size, *images.shape[1:], dtype=torch.float32, device=self.device)
        x[: len(images)] = images
        if self.normalize is None:
            x.div_(127.5).sub_(1)
        else:
            mean, std = (torch.as_tensor(each, dtype=torch.float32, device=self.device) for each in self.normalize)
            x.div_(255).sub_(mean).div_(std)
        return x.to(dtype).permute(0, 3, 1, 2)

    def index(self, query: Query, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """int32 source rows and columns of a query's view of images ``[N, *size]``."""
        rows, columns = query.index(*size[:2]) or (torch.arange(size[0]), torch.arange(size[1]))
        return rows.to(self.device, torch.int32), columns.to(self.device, torch.int32)

    def view(self, query: Query, size: tuple[int, int, int]) -> View:
        """What a layer needs to read uint8 images ``[N, *size]`` through a query's view."""
        mean, std = (0.5, 0.5) if self.normalize is None else self.normalize
        mean, std = (torch.as_tensor(each, dtype=torch.float64).expand(size[2]) for each in (mean, std))
        scale, shift = (each.float().contiguous().to(self.device) for each in (1 / (255 * std), -mean / std))
        return View(*self.index(query, size), scale, shift)
