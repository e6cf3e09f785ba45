"""The blind attack: tell members from non-members by the images alone, without any model.

Where it succeeds the two sides differ by themselves (another scanner, year, hospital), and what an attack on a model
finds may be that difference and no leakage.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data.duplicates import digests
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_groups, as_images, as_integer, as_mask
from kr_fast.runtime.storage.image_rows import Images, batches, rows_of

SIDE = 8  # pixels of the small image among the features
FEWEST = 10  # examples on a side
MOST = 20_000  # examples; of more, as many are drawn
PENALTIES = 10.0 ** np.arange(-3, 5)  # of the ridge regression, in units of the features' mean variance


def blind(images: Images, members: Tensor, *, groups: Any = None, folds: int = 5, seed: int = 0) -> Tensor:
    """Scores of membership from the pixels alone, each from a classifier that never saw the example.

    Ridge regression of membership on features of an image: a small copy of 8 x 8 pixels, the histogram of its 256
    levels (square roots) and the mean absolute differences of neighbours, by channel; standardised. The penalty is
    chosen by generalised cross-validation on the training folds. Examples of fold k are scored by the regression on
    the other folds, so an AUC above 0.5 is a difference between the two sides and no fit to their noise.

    Args:
        images: uint8 ``[N, H, W, C]``; members: bool ``[N]``.
        groups: ``[N]`` integers or texts: the images of one (a patient, a site) are in one fold, or the classifier
            would know an example by others of its group.
        folds: at least 2; seed: of the folds, and of the 20,000 examples that are taken of more, half of them at least
            of the smaller side where there are so many.
    Returns: float64 ``[N]``, higher for members; NaN for examples that were not taken.
    Raises: UserError naming the argument, and with fewer than 10 examples on a side or one group alone.
    Source: Das, Zhang and Tramer, "Blind Baselines Beat Membership Inference Attacks for Foundation Models", 2024;
        the penalty: Golub, Heath and Wahba, Technometrics 21 (1979).
    """
    images, members = as_images("blind", "images", images), as_mask("blind", "members", members, 1)
    folds = as_integer("blind", "folds", folds, 2)
    if len(members) != len(images):
        fail("blind", "members", f"have shape [{len(images)}]", list(members.shape))
    inside = int(members.sum())
    if min(inside, len(members) - inside) < FEWEST:
        rule = f"hold at least {FEWEST} members and as many others"
        fail("blind", "members", rule, f"{inside} and {len(members) - inside}")
    known, inside = digests(images), members.tolist()
    # By content, so that where a record stands does not show in a digit.
    content = sorted(range(len(images)), key=lambda index: (known[index], inside[index]))
    order = torch.tensor(content)[torch.randperm(len(images), generator=seeds.generator(seed, "blind"))]
    # Sides take turns, so that each fold has its share of both; of the smaller one as few as possible are left out.
    first, second = (order[members[order] == side] for side in (False, True))
    most = [max(MOST // 2, MOST - len(other)) for other in (second, first)]
    order = torch.cat([first[: most[0]], second[: most[1]]])
    fold = torch.arange(len(order))
    if groups is not None:
        at = np.unique(as_groups("blind", "groups", groups, len(images))[order.numpy()], return_inverse=True)[1]
        _, first = np.unique(at, return_index=True)
        if len(first) < 2:
            fail("blind", "groups", "hold at least two groups", len(first))
        fold = torch.from_numpy(first.argsort().argsort()[at])
    fold = fold % folds
    x, y = image_features(rows_of(images, order)), members[order].double().numpy()
    scores = np.full(len(images), np.nan)
    for k in range(folds):
        mine = (fold == k).numpy()
        scores[order[mine]] = ridge(x[~mine], y[~mine], x[mine])
    return torch.from_numpy(scores)


def image_features(images: Images) -> np.ndarray:
    """float64 ``[N, F]``."""
    return np.concatenate([_features(part.cpu()) for part in batches(images)])


def _features(images: Tensor) -> np.ndarray:
    count, height, width, channels = images.shape
    x = images.permute(0, 3, 1, 2).double() / 255
    small = torch.nn.functional.adaptive_avg_pool2d(x, (min(SIDE, height), min(SIDE, width)))
    levels = images.reshape(count, height * width, channels).permute(0, 2, 1).long()
    levels = levels + 256 * torch.arange(count * channels).view(count, channels, 1)
    histogram = torch.bincount(levels.flatten(), minlength=256 * count * channels).view(count, -1).double()
    parts = [small.flatten(1), (histogram / (height * width)).sqrt()]
    parts += [x.diff(dim=axis).abs().mean((2, 3)) for axis in (2, 3) if x.shape[axis] > 1]
    return torch.cat(parts, 1).numpy()


def ridge(x: np.ndarray, y: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Scores of ``others`` by the ridge regression of y on x, by the smaller of the two Gram matrices."""
    mean, spread = x.mean(0), x.std(0)
    varies = spread > 1e-9
    a, b = (each[:, varies] for each in (x, others))  # copies, which are the largest arrays of an audit
    for each in (a, b):
        each -= mean[varies]
        each /= spread[varies]
    centred = y - y.mean()
    if not varies.any():
        return np.zeros(len(others))
    wide = a.shape[1] > len(a)
    values, vectors = np.linalg.eigh(a @ a.T if wide else a.T @ a)
    keep = values > 1e-10 * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    # y along the left singular vectors of a.
    along = vectors.T @ centred if wide else vectors.T @ (a.T @ centred) / np.sqrt(values)
    rest = float(centred @ centred)
    scale, best = values.sum() / len(values), (np.inf, 0.0)
    for penalty in PENALTIES * scale:
        shrink = values / (values + penalty)
        residual = rest - float((shrink * (2 - shrink)) @ along**2)
        freedom = len(y) - float(shrink.sum())
        best = min(best, (residual / freedom**2, penalty))
    weights = along * np.sqrt(values) / (values + best[1])
    right = a.T @ vectors / np.sqrt(values) if wide else vectors
    return b @ (right @ weights)
