"""Attacks on a released synthetic set: no model is asked, only the images that everybody is given."""

import math
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_tensor, described


def nearest_synthetic(
    images: Tensor, synthetic: Tensor, *, reference: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """Minus the distance to the nearest synthetic image; with a reference set, how much nearer than the nearest of it.

    ``-d(x, S)``, or ``ln d(x, R) - ln d(x, S)``: Euclidean, over pixels or any features.

    Args:
        images: ``[N, ...]``; synthetic: ``[S, ...]``; reference: ``[R, ...]`` real examples that are no members and are
            not among ``images``, of the same trailing shape.
        chunk: rows of the distance matrix at a time.
    Returns: float64 ``[N]``, higher for members.
    Source: Chen et al., "GAN-Leaks", CCS 2020.
    """
    x, s = _flat("nearest_synthetic", images=images, synthetic=synthetic)
    near = _nearest(x, s, chunk)
    if reference is None:
        return -near
    _, r = _flat("nearest_synthetic", images=images, reference=reference)
    tiny = torch.finfo(torch.float64).tiny
    return _nearest(x, r, chunk).clamp_min(tiny).log() - near.clamp_min(tiny).log()


def generated_density(
    images: Tensor, synthetic: Tensor, reference: Tensor, *, dimensions: int = 16, chunk: int = 1024
) -> Tensor:
    """Log ratio of two kernel densities at x: of the synthetic set over that of real non-members.

    Where a generator is denser than the population, it has over-fitted. Gaussian kernels, Scott's bandwidth, on the
    leading principal components of synthetic and reference images together.

    Args:
        images: ``[N, ...]``; synthetic: ``[S, ...]``; reference: ``[R, ...]``, non-members that are not in ``images``.
        dimensions: number of principal components.
    Returns: float64 ``[N]``.
    Source: van Breugel et al., "Membership Inference Attacks against Synthetic Data through Overfitting Detection"
        (DOMIAS), AISTATS 2023.
    """
    x, s = _flat("generated_density", images=images, synthetic=synthetic)
    _, r = _flat("generated_density", images=images, reference=reference)
    if dimensions < 1:
        fail("generated_density", "dimensions", "be at least 1", dimensions)
    both = torch.cat([s, r])
    mean = both.mean(0)
    centred = (both - mean).double()
    # Components by the smaller Gram matrix's eigenvectors: exact, and the same on every run.
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(both))
    rank = min(dimensions, int((values > 1e-12 * values[-1]).sum()))
    if rank == 0:
        fail("generated_density", "synthetic", "differ between images", "identical images")
    axes = vectors[:, -rank:] / values[-rank:].sqrt()
    x, s, r = (((part - mean).double() @ axes) for part in (x, s, r))
    return _log_density(x, s, chunk) - _log_density(x, r, chunk)


def _log_density(x: Tensor, points: Tensor, chunk: int) -> Tensor:
    d = x.shape[1]
    width = len(points) ** (-1 / (d + 4)) * float(points.std(0, correction=0).mean().clamp_min(1e-12))
    rows = [torch.logsumexp(-torch.cdist(part, points).square() / (2 * width**2), 1) for part in x.split(chunk)]
    return torch.cat(rows) - math.log(len(points)) - d * math.log(width)


def _nearest(x: Tensor, points: Tensor, chunk: int) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # a copied image must be at distance 0
    rows = [torch.cdist(part, points, compute_mode=exact).min(1).values for part in x.split(chunk)]
    return torch.cat(rows).double()


def _flat(where: str, **parts: Any) -> list[Tensor]:
    parts = {name: as_tensor(where, name, value) for name, value in parts.items()}
    first, rows = next(iter(parts.values())), []
    for name, value in parts.items():
        if value.ndim < 2 or len(value) == 0 or value.shape[1:] != first.shape[1:]:
            fail(where, name, f"have shape [n, {', '.join(map(str, first.shape[1:]))}] with n > 0", list(value.shape))
        if value.dtype.is_complex:
            fail(where, name, "hold real numbers", described(value))
        flat = value.detach().flatten(1).float()
        if not bool(torch.isfinite(flat).all()):
            fail(where, name, "be finite", "NaN or inf")
        rows.append(flat)
    return rows
