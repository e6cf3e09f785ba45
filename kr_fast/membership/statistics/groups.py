"""Groups of images that belong together, such as those of one patient, as the units of a figure."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of N images: ``names`` ``[G]``, in their order, and ``at``, int64 ``[N]``, the group of each."""

    names: np.ndarray
    at: Tensor

    @classmethod
    def of(cls, groups: Any) -> "Groups":
        """Of integers or texts ``[N]``."""
        names, at = np.unique(np.asarray(groups), return_inverse=True)
        return cls(names, torch.from_numpy(at))

    @property
    def sizes(self) -> Tensor:
        """float64 ``[G]``: images of each."""
        return torch.bincount(self.at, minlength=len(self.names)).double()

    def mean(self, values: Tensor) -> Tensor:
        """float64 ``[..., G]`` of ``[..., N]``."""
        sums = torch.zeros(*values.shape[:-1], len(self.names), dtype=torch.float64)
        return sums.index_add_(-1, self.at, values.double()) / self.sizes

    def shared(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(bool ``[..., G]``, whether all images of a group are under ``mask`` ``[..., N]``; bool ``[..., G]``, whether
        some are and some are not)."""
        share = self.mean(mask)
        return share == 1, (share > 0) & (share < 1)

    def units(self, values: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """(means ``[U]`` of ``values`` ``[N]``, bool ``[U]``, whether members) of the groups wholly on one side."""
        inside, mixed = self.shared(members)
        return self.mean(values)[~mixed], inside[~mixed]
