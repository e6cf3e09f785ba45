"""Hypothesis tests on released images: are the members nearer to them than images that the generator never saw?

Null hypothesis of all of them: given the released images, any of the pool's images might as well have been the members.
Then the chance of a result follows from rearranging members and held-out images alone, whatever the images are and
however they depend on each other on the synthetic side.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data.distances import Rows
from kr_fast.data.duplicates import digests
from kr_fast.membership.attacks.medoids import cluster_medoids
from kr_fast.membership.inputs.data import AuditData
from kr_fast.membership.statistics.auc_intervals import chance_above
from kr_fast.membership.statistics.curve import roc
from kr_fast.membership.statistics.intervals import check_share, holm
from kr_fast.membership.statistics.permutation import count_before, sum_above
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer, as_mask, as_tensor, described
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage.image_rows import ImageRows, Images, rows_of

PIECE = 16_384  # released images that are held as numbers at a time
LEAST = 2  # images on a side: one of them is compared with the others
CLOSEST = 0.01  # share of held-out images that are closer to a released image than the threshold of memorised pairs
LOW = 0.05  # the percentile that is reported beside a median
REACH = 0.05  # share of held-out images within the radius around medoids
TESTS = ("nearer", "dcr", "medoids", "memorised")


@dataclasses.dataclass(frozen=True)
class ReleasedTests:
    """What :func:`released_tests` finds.

    Args:
        figures: plain values that name no record, see there.
        ratio: float64 ``[N]``, of each image of the pool: its smallest distance to a released image, as a share of that
            image's distance to the nearest reference; of the references themselves it is at least 1.
        nearest: int64 ``[N]``, the released image that gives it; distance: float64 ``[N]``, to that image.
    """

    figures: dict[str, Any]
    ratio: Tensor
    nearest: Tensor
    distance: Tensor

    def closest(self, members: Tensor, count: int) -> list[dict[str, Any]]:
        """The ``count`` members of the smallest ratio: position in the pool, synthetic, distance, ratio."""
        at = members.nonzero()[:, 0]
        at = at[self.ratio[at].argsort(stable=True)[:count]]
        columns = {"position": at, "synthetic": self.nearest[at]}
        columns |= {"distance": self.distance[at], "ratio": self.ratio[at]}
        return [
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        ]


def released_tests(
    images: Images,
    members: Tensor,
    synthetic: Tensor,
    *,
    level: float = 0.95,
    seed: int = 0,
    description: str | None = None,
) -> ReleasedTests:
    """Distances between a released set and the images of a pool, tested against its non-members ("held-out").

    All distances are Euclidean, and reported as root mean square difference of the values (grey levels). With ``m``
    members and ``n`` held-out images:

    - ``nearer``: Mann-Whitney test of ``d(x, S)``, one-sided: "auc" is the probability that a member is nearer to the
      released images than a held-out image, with its interval; p by permutation (mid-p).
    - ``dcr``, distance to the closest record: median and 5th percentile over released images of their distance to the
      nearest member, and to the nearest held-out image, of equally many on both sides. "share" of released images have
      a member as their closest record (a tie counts by halves), "expected" is ``m / (m + n)``. Its p is that of
      ``sum_i w_i``, ``w_i`` the released images whose closest record is i, if members are drawn by chance. (A binomial
      test would take the released images as independent, and many share a closest record.)
    - ``nndr``, nearest neighbour distance ratio: of each released image the distance to the nearest record over that to
      the second nearest, of equally many on both sides.
    - ``medoids``: the Mann-Whitney test of the distance to the nearest of ``sqrt(S)`` (at most 128) cluster medoids;
      "coverage", the share of members within the radius that holds 5 % of the held-out images, and "hits", the share of
      medoids with a member (a held-out image) of equally many within it.
    - ``memorised``: half of the held-out images, drawn by chance, are references R, the n' others are compared:
      ``r(x) = min_s d(s, x) / d(s, R)``. "count" members have a smaller r than the k-th smallest of those compared, ``k
      = ceil(n' / 100)``; by chance that are at most "expected" ``= k m / (n' + 1)``, and p is that of as many members
      before the k-th compared image in a random order. (References that are compared too break that: where no held-out
      image lies in a cluster of the pool, all of its members come first.) "copies" are released images equal to a
      member, and to a held-out image.

    Args:
        images: ``[N, ...]``, uint8 pixels (distances are exact then) or float features.
        members: bool ``[N]``, at least 2 and at least 2 others.
        synthetic: ``[S, ...]``, of the same trailing shape.
        level: of intervals; seed: of the draws of equally many records, and of clusters.
        description: shows a progress bar under this name.
    Raises: UserError naming the argument.
    Source: Amin et al., "Phantoms and Disclosures" (2026), for held-out images as the control; Meehan, Chaudhuri and
        Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020, for the rank test;
        medoids: Mustaqim, Kotal and Yi, "When Privacy Isn't Synthetic" (2025).
    """
    images, members, synthetic = _checked(images, members, synthetic)
    check_share("released_tests", "level", level)
    seed = as_integer("released_tests", "seed", seed, 0)
    # By content, so that where a record stands does not show in a digit.
    content = torch.tensor(sorted(range(len(images)), key=digests(images).__getitem__))
    order = content[torch.randperm(len(content), generator=seeds.generator(seed, "released tests"))]
    order = torch.cat([order[members[order]], order[~members[order]]])
    inside = int(members.sum())
    matched, references = min(inside, len(order) - inside), (len(order) - inside) // 2
    real, found = Rows(rows_of(images, order)), _Nearest(len(synthetic), inside, len(order), matched, references)
    with bar(len(synthetic), description, "image") as progress:
        for start in range(0, len(synthetic), PIECE):
            for first, part in Rows(synthetic[start : start + PIECE]).blocks(len(real)):
                found.add(start + first, part.squared_distances(real))
                progress.update(len(part))
    mask = torch.arange(len(order)) < inside
    width = real.width
    figures = {"members": inside, "held_out": len(order) - inside, "synthetic": len(synthetic), "matched": matched}
    figures["nearer"] = _rank_test(found.of_real, mask, level)
    figures["dcr"] = _dcr(found, mask, width)
    figures["nndr"] = {side: _quantiles(_ratio(*two.T)) for side, two in found.two.items()}
    chosen = synthetic[cluster_medoids(synthetic, seed=seed)]
    figures["medoids"] = _medoids(Rows(chosen).squared_distances(real), mask, matched, width, level)
    figures["memorised"] = _memorised(found, exact=images.dtype == torch.uint8)
    back = order.argsort()
    distance = (found.pair.double() / width).sqrt()
    return ReleasedTests(figures, found.ratio.double().sqrt()[back], found.nearest[back], distance[back])


class _Nearest:
    """Minima of a matrix of squared distances ``[S, m + n]`` that comes in blocks of rows.

    Members come first, then ``references`` held-out images, and of both sides the ``matched`` that are drawn for a
    comparison of equally many. ``two``: side -> ``[S, 2]``, nearest and second nearest of those; ``least``: side ->
    ``[S]``, nearest of all; ``weights``: ``[N]``, released images that have this record as their closest; ``of_real``:
    ``[N]``, nearest released image; ``ratio``, ``nearest``, ``pair``: see :class:`ReleasedTests`, squared.
    """

    def __init__(self, synthetic: int, members: int, total: int, matched: int, references: int):
        self.members, self.matched, self.compared = members, matched, members + references
        self.two = {side: torch.empty(synthetic, 2, dtype=torch.float64) for side in ("members", "held_out")}
        self.least = {side: torch.empty(synthetic, dtype=torch.float64) for side in ("members", "held_out")}
        self.weights = torch.zeros(total, dtype=torch.float64)
        self.of_real, self.ratio, self.pair = (torch.full((total,), torch.inf, dtype=torch.float64) for _ in range(3))
        self.nearest = torch.zeros(total, dtype=torch.int64)

    def add(self, first: int, block: Tensor) -> None:
        """Squared distances of the released images from ``first`` on."""
        at = slice(first, first + len(block))
        for side, part in (("members", block[:, : self.members]), ("held_out", block[:, self.members :])):
            self.two[side][at] = _two_least(part[:, : self.matched])
            self.least[side][at] = part.min(1).values
        least, closest = block.min(1)
        ties = block == least[:, None]
        alone = ties.sum(1) == 1
        self.weights.index_add_(0, closest[alone], torch.ones(int(alone.sum()), dtype=torch.float64))
        for row in ties[~alone]:
            self.weights[row] += 1 / int(row.sum())
        torch.minimum(self.of_real, block.min(0).values, out=self.of_real)
        ratio = block / block[:, self.members : self.compared].min(1, keepdim=True).values
        best, row = ratio.nan_to_num_(nan=1.0, posinf=torch.inf).min(0)  # both distances are 0: no evidence
        better = best < self.ratio
        self.ratio[better], self.nearest[better] = best[better].double(), first + row[better]
        self.pair[better] = block[row[better], better.nonzero()[:, 0]].double()


def _two_least(block: Tensor) -> Tensor:
    """The two smallest numbers of each row, ``[b, 2]``."""
    rows, (first, column) = torch.arange(len(block)), block.min(1)
    block[rows, column] = torch.inf
    second = block.min(1).values
    block[rows, column] = first
    return torch.stack([first, second], 1)


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """Of two squared distances, as a ratio of distances; 1 where both are 0."""
    return (first / second).sqrt().nan_to_num(nan=1.0)


def _quantiles(values: Tensor) -> dict[str, float]:
    low, median = np.quantile(values.numpy(), [LOW, 0.5])
    return {"median": float(median), "low": float(low)}


def _rank_test(squares: Tensor, members: Tensor, level: float) -> dict[str, Any]:
    curve = roc(-squares, members)
    return {
        "auc": curve.auc,
        "interval": list(curve.auc_interval(level)),
        "p": chance_above(*curve.groups, curve.auc),
    }


def _dcr(found: _Nearest, members: Tensor, width: int) -> dict[str, Any]:
    sides = {side: _quantiles((two[:, 0] / width).sqrt()) for side, two in found.two.items()}
    weights, mask = found.weights.numpy(), members.numpy()
    share = float(weights[mask].sum()) / float(weights.sum())
    return {**sides, "share": share, "expected": float(mask.mean()), "p": sum_above(weights, mask)}


def _medoids(block: Tensor, members: Tensor, matched: int, width: int, level: float) -> dict[str, Any]:
    nearest, inside = block.double().min(0).values, int(members.sum())
    radius = float(np.quantile(nearest[~members].numpy(), REACH))
    hits = {"members": block[:, :matched], "held_out": block[:, inside : inside + matched]}
    return {
        "clusters": len(block),
        **_rank_test(nearest, members, level),
        "radius": (radius / width) ** 0.5,
        "coverage": float((nearest[members] <= radius).double().mean()),
        "hits": {side: float((part <= radius).any(1).double().mean()) for side, part in hits.items()},
    }


def _memorised(found: _Nearest, exact: bool) -> dict[str, Any]:
    ratio, compared = found.ratio[: found.members], found.ratio[found.compared :].sort().values
    rank = math.ceil(CLOSEST * len(compared))
    count = int((ratio < compared[rank - 1]).sum())
    copies = {side: int((least == 0).sum()) for side, least in found.least.items()} if exact else None
    p = count_before(count, rank, len(ratio), len(compared))
    return {"count": count, "expected": rank * len(ratio) / (len(compared) + 1), "rank": rank, "p": p, "copies": copies}


def _checked(images: Any, members: Any, synthetic: Any) -> tuple[Images, Tensor, Images]:
    """Tensors on the CPU that can be compared."""
    where = "released_tests"
    images, synthetic = (
        (value if isinstance(value, ImageRows) else as_tensor(where, name, value).detach()).cpu()
        for name, value in (("images", images), ("synthetic", synthetic))
    )
    members = as_mask(where, "members", members, 1).cpu()
    if images.ndim < 2 or images[:1].numel() == 0:
        fail(where, "images", "have shape [N, ...] with N > 0", list(images.shape))
    if len(members) != len(images):
        fail(where, "members", f"have shape [{len(images)}]", list(members.shape))
    if (inside := int(members.sum())) < LEAST or len(members) - inside < LEAST:
        rule = f"hold at least {LEAST} members and as many held-out images"
        fail(where, "members", rule, f"{inside} and {len(members) - inside}")
    if len(synthetic) == 0 or synthetic.shape[1:] != images.shape[1:] or synthetic.dtype != images.dtype:
        rule = f"be {described(images).split()[0]} [S, {', '.join(map(str, images.shape[1:]))}] with S > 0"
        fail(where, "synthetic", rule, described(synthetic))
    for name, value in (("images", images), ("synthetic", synthetic)):
        if value.dtype != torch.uint8 and not bool(torch.isfinite(value).all()):
            fail(where, name, "be finite", "NaN or inf")
    return images, members, synthetic


def compare_released(
    data: AuditData, *, level: float = 0.95, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, ReleasedTests]]:
    """(name of a released set -> figures, name -> its tests in pixels) of an audit's data.

    Figures: "pixels" and "features" (None without features of both sides) of :func:`released_tests`, each p with
    "p_corrected" (Holm, over the tests of the set in both spaces), "p", the smallest of these, and "by_group". With
    groups (the images of a patient) one image of each, drawn by chance, is tested: several of one are no chance of
    their own. Nothing without images of the pool, or with fewer than 2 members or others to test.
    """
    if data.images is None or data.members is None:
        return {}, {}
    at = torch.arange(data.count) if data.groups is None else _one_of_each(data.groups, data.members, seed)
    members = data.members[at]
    if not LEAST <= int(members.sum()) <= len(at) - LEAST:
        return {}, {}
    figures, tests = {}, {}
    for name, synthetic in data.synthetic.items():
        options = {"level": level, "seed": seeds.derive(seed, name), "description": f"distances to {name}"}
        tests[name] = released_tests(data.images, data.members, synthetic, **options)
        spaces: dict[str, Any] = {"pixels": tests[name].figures, "features": None}
        if data.groups is not None:
            spaces["pixels"] = released_tests(rows_of(data.images, at), members, synthetic, **options).figures
        if data.features is not None and (made := data.synthetic_features.get(name)) is not None:
            spaces["features"] = released_tests(data.features[at], members, made, **options).figures
        rows = [space[test] for space in spaces.values() if space for test in TESTS]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_corrected"] = p
        smallest = min(row["p_corrected"] for row in rows)
        figures[name] = {**spaces, "p": smallest, "by_group": data.groups is not None}
    return figures, tests


def _one_of_each(groups: np.ndarray, members: Tensor, seed: int) -> Tensor:
    """Indices of one image of each group on each side."""
    order = torch.randperm(len(members), generator=seeds.generator(seed, "one of each group")).numpy()
    sides = np.char.add(groups.astype(str), np.where(members.numpy(), "+", "-"))
    return torch.from_numpy(np.sort(order[np.unique(sides[order], return_index=True)[1]]))
