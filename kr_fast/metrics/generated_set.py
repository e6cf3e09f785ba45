"""All figures of a set of generated images beside real ones, with intervals."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.data.distances import Rows
from kr_fast.metrics.generated import LEAST, NEAREST_OF_DENSITY, checked, frechet, kernel, moments, radii
from kr_fast.metrics.jackknife import PARTS, interval, parts_of
from kr_fast.runtime.inputs import as_integer

MOST_FEATURES = 256  # up to which the Frechet distance has an interval, which takes 21 of them
SHARES = ("precision", "recall", "coverage")
BLOCK = 1024  # rows of a kernel


def set_figures(real: Any, generated: Any, *, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Frechet distance, kernel distance, precision, recall, density and coverage of generated images, with intervals.

    - "fid": :func:`kr_fast.metrics.frechet_distance`. Its interval is one of the distance of the two distributions: the
      bias of finite numbers is taken out as far as it falls with 1 / N, so it lies below the figure.
    - "kid": the estimate without bias of :func:`kr_fast.metrics.kernel_distance`, of all images at once: ``sum_(i != j)
      k(x_i, x_j) / (N (N - 1)) + sum_(i != j) k(y_i, y_j) / (M (M - 1)) - 2 sum_(i, j) k(x_i, y_j) / (N M)``.
    - "precision", "recall", "density", "coverage": :func:`kr_fast.metrics.neighbourhood_figures`.

    Intervals ("fid_ci", ...) are those of a jackknife of 20 parts of both sets (:mod:`kr_fast.metrics.jackknife`). For
    the last four the balls stay those of all images. The Frechet distance has none (None) where there are fewer than
    two images for each feature, as its bias does not fall with 1 / N there, and above 256 features.

    Args:
        real: ``[N, d]`` float; generated: ``[M, d]`` float; both of at least 6 images.
        seed: of the parts.
        level: coverage of the intervals.
    Raises: UserError naming the argument.
    """
    pair = checked("set_figures", real, generated, LEAST)
    seed = as_integer("set_figures", "seed", seed, 0)
    count = min(PARTS, *map(len, pair))
    parts = tuple(parts_of(len(each), count, seed + at) for at, each in enumerate(pair))
    value, without = _frechet(*pair, *parts)
    figures: dict[str, Any] = {"fid": value, "fid_ci": None}
    if without is not None:
        figures["fid_ci"] = interval(value, without, bounds=(0.0, torch.inf), unbiased=True, level=level)
    value, without = _kernel_estimates(*pair, *parts)
    figures |= {"kid": value, "kid_ci": interval(value, without, level=level)}
    for name, (value, without) in _neighbourhood(Rows(pair[0]), Rows(pair[1]), *parts).items():
        bounds = (0.0, 1.0 if name in SHARES else torch.inf)
        figures |= {name: value, f"{name}_ci": interval(value, without, level=level, bounds=bounds)}
    return figures


def _frechet(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> tuple[float, Tensor | None]:
    """(value, ``[G]`` without each part); None of too many features, or too few images for them."""
    value, features = frechet(moments(x), moments(y)), x.shape[1]
    if features > MOST_FEATURES or min(len(x), len(y)) < 2 * features:
        return value, None
    rest = ((moments(x[of_x[:, g] == 0]), moments(y[of_y[:, g] == 0])) for g in range(of_x.shape[1]))
    return value, torch.tensor([frechet(*pair) for pair in rest], dtype=torch.float64)


def _kernel_estimates(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> tuple[float, Tensor]:
    """(estimate, ``[G]`` without each part), from the sums over pairs of parts."""
    sums = [_sums(*sides) for sides in ((x, x, of_x, of_x), (y, y, of_y, of_y), (x, y, of_x, of_y))]
    sums[0] -= torch.diag(of_x.T @ _own(x))
    sums[1] -= torch.diag(of_y.T @ _own(y))
    n, m = of_x.sum(0), of_y.sum(0)
    value = _estimate([each.sum() for each in sums], len(x), len(y))
    return float(value), _estimate([_rest(each) for each in sums], len(x) - n, len(y) - m)


def _rest(sums: Tensor) -> Tensor:
    """``[G]``: the sum of ``[G, G]`` without row and column g."""
    return sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()


def _estimate(sums: list[Tensor], n: Any, m: Any) -> Tensor:
    estimate: Tensor = sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1)) - 2 * sums[2] / (n * m)
    return estimate


def _sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """``[G, G]``: the kernel summed over the pairs of each two parts."""
    total = x.new_zeros(of_x.shape[1], of_y.shape[1])
    for rows, own in zip(x.split(BLOCK), of_x.split(BLOCK), strict=True):
        total += own.T @ (kernel(rows, y) @ of_y)
    return total


def _own(x: Tensor) -> Tensor:
    """``[N]``: the kernel of each image with itself."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _neighbourhood(x: Rows, y: Rows, of_x: Tensor, of_y: Tensor) -> dict[str, tuple[float, Tensor]]:
    """{figure: (value, ``[G]`` without each part)} of real x and generated y, with the balls of all images."""
    ball_x, ball_y = radii(x), radii(y)
    parts = of_x.shape[1]
    precise = torch.zeros(parts, len(y), dtype=torch.float64)  # balls of each part's real images that hold y_j
    inside = torch.zeros(parts, parts, dtype=torch.float64)
    recalled, covered = [], []
    for first, part in x.blocks(len(y)):
        block, rows = part.squared_distances(y), slice(first, first + len(part))
        precise += of_x[rows].T @ (block <= ball_x[rows, :1]).double()
        recalled.append((block <= ball_y[:, 0]).double() @ of_y)
        within = (block <= ball_x[rows, 1:]).double() @ of_y
        inside += of_x[rows].T @ within
        covered.append(within)
    shares = {
        "precision": (precise.T, of_y),
        "recall": (torch.cat(recalled), of_x),
        "coverage": (torch.cat(covered), of_x),
    }
    figures = {name: _share(*sides) for name, sides in shares.items()}
    # With fixed balls the sum grows with the real images too, of which density is a mean for each generated one.
    scale = NEAREST_OF_DENSITY * (len(y) - of_y.sum(0)) * (len(x) - of_x.sum(0)) / len(x)
    figures["density"] = float(inside.sum()) / (NEAREST_OF_DENSITY * len(y)), _rest(inside) / scale
    return figures


def _share(hits: Tensor, own: Tensor) -> tuple[float, Tensor]:
    """Share of images with a hit, and the same without each part: of the images and of what hits them.

    Args:
        hits: ``[n, G]``, how many of each part hit an image; own: one-hot ``[n, G]``, the part of each image.
    """
    total = hits.sum(1, keepdim=True)
    left = ((total - hits) > 0).double() * (1 - own)
    return float((total > 0).double().mean()), left.sum(0) / (len(own) - own.sum(0))
