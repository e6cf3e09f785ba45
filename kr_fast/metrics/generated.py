"""How near generated images are to real ones, by features of both: Frechet and kernel distance, precision, coverage.

All in float64 and a block of distances at a time, so that memory stays bounded at any number of images.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data.distances import Rows
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer, as_tensor, described

SUBSETS, SUBSET_SIZE = 50, 1000
NEAREST, NEAREST_OF_DENSITY = 3, 5  # neighbours of precision and recall, of density and coverage
LEAST = NEAREST_OF_DENSITY + 1  # images that have as many neighbours


def frechet_distance(real: Any, generated: Any) -> float:
    """Frechet distance of the normal distributions with the means and covariances of two sets, as in FID.

    ``|m - n|^2 + tr(S + T - 2 (S^(1/2) T S^(1/2))^(1/2))``, of means m, n and covariances S, T (with N - 1) of real and
    generated features, by two symmetric eigenvalue problems; at least 0. It is biased upwards, by about d / N and more
    where there are fewer images than features: compare only figures of equally many images.

    Args:
        real: ``[N, d]`` float; generated: ``[M, d]`` float; both of at least 2 images.
    Raises: UserError naming the argument.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, eq. 6; Dowson and Landau,
        "The Frechet Distance between Multivariate Normal Distributions", J. Multivariate Analysis 12 (1982).
    """
    return frechet(*map(moments, checked("frechet_distance", real, generated, 2)))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean ``[d]``, covariance ``[d, d]``)."""
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet(real: tuple[Tensor, Tensor], generated: tuple[Tensor, Tensor]) -> float:
    """:func:`frechet_distance` of two means and covariances."""
    (m, s), (n, t) = real, generated
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    alike = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return max(float((m - n).square().sum() + s.trace() + t.trace() - 2 * alike), 0.0)


def kernel_distance(
    real: Any, generated: Any, *, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> dict[str, Any]:
    """Kernel Inception Distance, of any features: the squared maximum mean discrepancy of a cubic kernel.

    ``k(x, y) = (x . y / d + 1)^3``, and of ``m`` real features x and ``m`` generated ones y, without bias,
    ``sum_(i != j) (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_(i, j) k(x_i, y_j) / m^2``: 0 on average, and so
    negative at times, where both are of one distribution. It is the mean over subsets drawn without replacement.

    Args:
        real: ``[N, d]`` float; generated: ``[M, d]`` float; both of at least 4 images.
        seed: of the subsets.
        subset_size: m; at most half of the fewer images, so that subsets differ.
    Returns: {"mean", "sd" (of the subsets: at m images, not of the mean), "subsets", "subset_size"}.
    Raises: UserError naming the argument.
    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, eq. 4 and section 4.
    """
    where = "kernel_distance"
    real, generated = checked(where, real, generated, 4)
    subsets, subset_size = (
        as_integer(where, "subsets", subsets, 2),
        as_integer(where, "subset_size", subset_size, 2),
    )
    size, rng = min(subset_size, len(real) // 2, len(generated) // 2), np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (each[torch.from_numpy(rng.choice(len(each), size, replace=False))] for each in (real, generated))
        alike = sum(float(kernel(each, each).fill_diagonal_(0).sum()) for each in (x, y))
        values.append(alike / (size * (size - 1)) - 2 * float(kernel(x, y).mean()))
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)),
        "subsets": subsets,
        "subset_size": size,
    }


def neighbourhood_figures(real: Any, generated: Any) -> dict[str, float]:
    """Precision, recall, density and coverage of generated images.

    ``B_k(x)`` is the ball around x, its surface included, that reaches to the k-th nearest other image of x's own set.

    - precision: share of generated images in a ``B_3`` of a real one. recall: share of real ones in a ``B_3`` of a
      generated one.
    - density: ``sum_(i, j) 1[y_j in B_5(x_i)] / (5 M)`` over real x and generated y: precision that counts how many
      balls an image lies in, so that one outlier among the real images matters less; may exceed 1.
    - coverage: share of real images whose ``B_5`` holds a generated one.

    Of two sets from one distribution density is 1 on average and coverage
    ``1 - (N - 1) ... (N - 5) / ((M + N - 1) ... (M + N - 5))`` (0.97 for N = M). All but density depend on the numbers
    of images, so only figures of equally many can be compared.

    Args:
        real: ``[N, d]`` float; generated: ``[M, d]`` float; both of at least 6 images.
    Returns: {"precision", "recall", "density", "coverage"}.
    Raises: UserError naming the argument.
    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
        eq. 1 and 2; Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, sec. 3.
    """
    real, generated = (Rows(each) for each in checked("neighbourhood_figures", real, generated, LEAST))
    of_real, of_generated = radii(real), radii(generated)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled, covered, inside = [], [], 0
    for first, part in real.blocks(len(generated)):
        block, rows = part.squared_distances(generated), slice(first, first + len(part))
        precise |= (block <= of_real[rows, :1]).any(0)
        recalled.append((block <= of_generated[:, 0]).any(1))
        within = block <= of_real[rows, 1:]
        inside += int(within.sum())
        covered.append(within.any(1))
    return {
        "precision": float(precise.double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": inside / (NEAREST_OF_DENSITY * len(generated)),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def radii(rows: Rows) -> Tensor:
    """``[N, 2]``: squared distances to the 3rd and to the 5th nearest other row."""
    parts = []
    for first, part in rows.blocks(len(rows)):
        block = part.squared_distances(rows)
        block[torch.arange(len(part)), torch.arange(first, first + len(part))] = torch.inf
        nearest = block.topk(NEAREST_OF_DENSITY, largest=False).values
        parts.append(nearest[:, [NEAREST - 1, NEAREST_OF_DENSITY - 1]])
    return torch.cat(parts)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """``[n, m]``: the cubic kernel."""
    product = torch.mm(x, y.T).div_(x.shape[1]).add_(1)
    return product * product * product


def checked(where: str, real: Any, generated: Any, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU."""
    pair: list[Tensor] = []
    for name, value in (("real", real), ("generated", generated)):
        value = as_tensor(where, name, value).detach()
        width = pair[0].shape[1] if pair else "d"
        fits = value.ndim == 2 and value.shape[1] > 0 and (not pair or value.shape[1] == width)
        if not fits or not value.dtype.is_floating_point or len(value) < least:
            fail(where, name, f"be float [N, {width}] of at least {least} images", described(value))
        if not bool(value.isfinite().all()):
            fail(where, name, "be finite", f"{int((~value.isfinite()).sum())} values that are not")
        pair.append(value.cpu().double())
    return pair[0], pair[1]
