"""Cluster medoids of released images: the pictures around which a generator draws most."""

import torch
from torch import Tensor

from kr_fast.runtime import seeds

ROUNDS = 20
BATCH, PART_BYTES = 1024, 16 << 20
MOST = 16_384


def cluster_medoids(synthetic: Tensor, clusters: int | None = None, *, seed: int = 0) -> Tensor:
    """Indices of the medoids of k-means clusters, int64 ``[k]``: one for each cluster that holds an image.

    Lloyd's algorithm from ``clusters`` images drawn by chance. A medoid is the image with the least sum of squared
    distances to its cluster, which is the one nearest to the mean. Of more than 16,384 images as many are drawn first.

    Args:
        synthetic: ``[S, ...]``, bytes or floats.
        clusters: at most as many are made; None for the square root of the number of images.
        seed: of the draws.
    Source: Mustaqim, Kotal and Yi, "When Privacy Isn't Synthetic" (2025), whose attack looks around such medoids.
    """
    taken = torch.randperm(len(synthetic), generator=seeds.generator(seed, "medoids"))[:MOST]
    flat = synthetic.flatten(1)[taken]
    centres, before = flat[: round(len(flat) ** 0.5) if clusters is None else clusters].double(), None
    for _ in range(ROUNDS):
        nearest, _ = _assigned(flat, centres)
        if before is not None and torch.equal(nearest, before):
            break
        before, sums = nearest, torch.zeros_like(centres)
        for part, at in zip(_parts(flat), _parts(nearest, flat), strict=True):
            sums.index_add_(0, at, part.double())
        counts = nearest.bincount(minlength=len(centres))
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
    nearest, gaps = _assigned(flat, centres)
    order = gaps.argsort(stable=True)
    first = torch.full((len(centres),), len(flat))
    first.scatter_reduce_(0, nearest[order], torch.arange(len(flat)), "amin")
    return taken[order[first[first < len(flat)]]]


def _parts(values: Tensor, of: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows at a time, as many as of ``of`` (None: ``values``) are 16 MiB in float64."""
    width = (values if of is None else of).shape[1]
    return values.split(max(1, min(BATCH, PART_BYTES // (8 * width))))


def _assigned(flat: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the nearest centre, squared distance to it) of each row."""
    middle = centres.mean(0)
    centres = centres - middle
    squares, found = centres.square().sum(1), []
    for part in _parts(flat):
        x = part.double() - middle
        found.append((squares - 2 * x @ centres.T + x.square().sum(1)[:, None]).min(1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])
