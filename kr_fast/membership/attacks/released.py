"""Attacks on a released synthetic set: no model is asked, only the images that everybody is given."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kr_fast.data.distances import Rows, nearest
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_tensor, described
from kr_fast.runtime.storage.image_rows import ImageRows, Images, batches

WIDEST, SAMPLE = 4096, 1024  # values of an image up to which all images give the components, and images that do above
BLOCK_BYTES = 32 << 20  # of distances


def nearest_synthetic(
    images: Images, synthetic: Tensor, *, reference: Images | None = None, chunk: int = 1024
) -> Tensor:
    """Minus the distance to the nearest synthetic image; with a reference set, how much nearer than the nearest of it.

    ``-d(x, S)``, or ``ln d(x, R) - ln d(x, S)``: Euclidean, over pixels (exact where all are uint8) or any features.

    Args:
        images: ``[N, ...]``; synthetic: ``[S, ...]``; reference: ``[R, ...]`` real examples that are no members and are
            not among ``images``, of the same trailing shape.
        chunk: rows of the distance matrix at a time.
    Returns: float64 ``[N]``, higher for members.
    Source: Chen et al., "GAN-Leaks", CCS 2020.
    """
    further = {} if reference is None else {"reference": reference}
    x, *points = _checked("nearest_synthetic", images=images, synthetic=synthetic, **further)
    near, *of_reference = _nearest(x, points, chunk)
    if reference is None:
        return -near
    tiny = torch.finfo(torch.float64).tiny
    return of_reference[0].clamp_min(tiny).log() - near.clamp_min(tiny).log()


def generated_density(
    images: Images, synthetic: Tensor, reference: Images, *, dimensions: int = 16, chunk: int = 1024
) -> Tensor:
    """Log ratio of two kernel densities at x: of the synthetic set over that of real non-members.

    Where a generator is denser than the population, it has over-fitted. Gaussian kernels, Scott's bandwidth, on the
    leading principal components of synthetic and reference images together.

    Args:
        images: ``[N, ...]``; synthetic: ``[S, ...]``; reference: ``[R, ...]``, non-members that are not in ``images``.
        dimensions: number of principal components.
        chunk: images at a time, which decides the memory alone.
    Returns: float64 ``[N]``. Raises: UserError naming the argument.
    Source: van Breugel et al., "Membership Inference Attacks against Synthetic Data through Overfitting Detection"
        (DOMIAS), AISTATS 2023.
    """
    x, s, r = _checked("generated_density", images=images, synthetic=synthetic, reference=reference)
    if dimensions < 1:
        fail("generated_density", "dimensions", "be at least 1", dimensions)
    mean, axes = _components([s, r], dimensions)
    x, s, r = (torch.cat([(part - mean) @ axes for part in _parts(each)]) for each in (x, s, r))
    return _log_density(x, s, chunk) - _log_density(x, r, chunk)


def _components(sets: list[Images], dimensions: int) -> tuple[Tensor, Tensor]:
    """(mean ``[D]``, leading principal axes ``[D, d]`` over their standard deviations), float64, of all sets together.

    By the smaller Gram matrix's eigenvectors: exact, and the same on every run. Of images of more than 4,096 values
    the axes are those of 1,024 images, spread evenly.
    """
    count = sum(map(len, sets))
    mean = sum(part.sum(0) for each in sets for part in _parts(each)) / count
    some = None
    if len(mean) <= WIDEST:
        gram = sum((part - mean).T @ (part - mean) for each in sets for part in _parts(each)) / count
    else:
        step = -(-count // SAMPLE)
        some = torch.cat([each[::step].flatten(1) for each in sets])
        gram = sum(part @ part.T for part in _columns(some, mean)) / len(some)
    values, vectors = torch.linalg.eigh(gram)
    rank = min(dimensions, int((values > 1e-12 * values[-1]).sum()))
    if rank == 0:
        fail("generated_density", "synthetic", "differ between images", "identical images")
    values, vectors = values[-rank:], vectors[:, -rank:]
    if some is None:
        return mean, vectors / values.sqrt()
    turned = torch.cat([part.T @ vectors for part in _columns(some, mean)])
    return mean, turned / (len(some) ** 0.5 * values)


def _columns(rows: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """The rows less their mean in float64, some columns at a time."""
    return (part.double() - of for part, of in zip(rows.split(SAMPLE, 1), mean.split(SAMPLE), strict=True))


def _parts(values: Images) -> Iterator[Tensor]:
    """Rows as float64 ``[n, D]``, some at a time."""
    return (part.flatten(1).double() for part in batches(values))


def _log_density(x: Tensor, points: Tensor, chunk: int) -> Tensor:
    d, chunk = x.shape[1], max(1, min(chunk, BLOCK_BYTES // (8 * len(points))))
    width = len(points) ** (-1 / (d + 4)) * float(points.std(0, correction=0).mean().clamp_min(1e-12))
    rows = [torch.logsumexp(-torch.cdist(part, points).square() / (2 * width**2), 1) for part in x.split(chunk)]
    return torch.cat(rows) - math.log(len(points)) - d * math.log(width)


def _nearest(x: Images, sets: list[Images], chunk: int) -> list[Tensor]:
    """float64 ``[N]`` for each set: the distance to the nearest of its points."""
    if all(each.dtype == torch.uint8 for each in (x, *sets)):
        rows = Rows(x)
        return [nearest(rows, points) for points in sets]
    exact = "donot_use_mm_for_euclid_dist"  # a copied image must be at distance 0
    x, *sets = (each.detach().flatten(1).float() for each in (x, *sets))
    return [
        torch.cat([torch.cdist(part, points, compute_mode=exact).min(1).values for part in x.split(chunk)]).double()
        for points in sets
    ]


def _checked(where: str, **parts: Any) -> list[Images]:
    parts = {
        name: value if isinstance(value, ImageRows) else as_tensor(where, name, value).detach()
        for name, value in parts.items()
    }
    first = next(iter(parts.values()))
    for name, value in parts.items():
        if value.ndim < 2 or len(value) == 0 or value.shape[1:] != first.shape[1:]:
            fail(where, name, f"have shape [n, {', '.join(map(str, first.shape[1:]))}] with n > 0", list(value.shape))
        if value.dtype.is_complex:
            fail(where, name, "hold real numbers", described(value))
        if value.dtype.is_floating_point and not bool(torch.isfinite(value.float()).all()):
            fail(where, name, "be finite", "NaN or inf")
    return list(parts.values())
