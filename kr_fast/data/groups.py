"""Groups of images that belong together (of a patient, a site): cuts that part none of them."""

import numpy as np

MOST_DRAWS, MOST_STEPS = 16, 20_000  # orders that are tried, and groups in them together


def cut_by_group(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool ``[N]``: whole groups with about ``fraction`` of the images of each class.

    In an order drawn by ``seed``, a group is taken if that lowers ``sum_c (n_c - t_c)^2 / t_c`` for the n_c images of
    class c taken and ``t_c = fraction N_c``, and leaves an image of each class. The best of up to 16 orders counts.
    Where no group lowers the sum, the one that raises it least is taken.

    Args:
        labels, groups: integers ``[N]``.
    Returns: all False where each group holds all images of some class.
    """
    classes, of_class = np.unique(labels, return_inverse=True)
    _, at = np.unique(groups, return_inverse=True)
    counts = np.zeros((int(at.max()) + 1, len(classes)))
    np.add.at(counts, (at, of_class), 1)
    whole = counts.sum(0)
    target = fraction * whole
    draw = np.random.default_rng(seed)
    best, least = np.zeros(len(counts), dtype=bool), np.inf
    for _ in range(max(1, min(MOST_DRAWS, MOST_STEPS // len(counts)))):
        taken, value = _taken(counts, whole, target, draw.permutation(len(counts)))
        if taken.any() and value < least:
            best, least = taken, value
    return best[at]


def _taken(counts: np.ndarray, whole: np.ndarray, target: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, float]:
    """(bool ``[G]``, the sum)."""
    taken, inside = np.zeros(len(counts), dtype=bool), np.zeros(len(whole))
    value, nearest = float(target.sum()), (np.inf, -1)
    for group in order:
        after = inside + counts[group]
        if (after == whole).any():
            continue
        if (new := float(((after - target) ** 2 / target).sum())) < value:
            taken[group], inside, value = True, after, new
        elif not taken.any():
            nearest = min(nearest, (new, int(group)))
    if not taken.any() and nearest[1] >= 0:
        taken[nearest[1]], value = True, nearest[0]
    return taken, value
