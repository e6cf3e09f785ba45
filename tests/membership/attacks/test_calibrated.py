"""The calibrated attack on synthetic images: LiRA of its own words, what it takes off, and a null of one half."""

import math
import statistics

import pytest
import torch

from kr_fast.membership import calibrated_nearest, partners
from kr_fast.membership.attacks.calibrated import attack_nearest

MODELS, COUNT = 8, 1500


def balanced_keep(seed, models=MODELS, count=COUNT):
    order = torch.rand(models, count, generator=torch.Generator().manual_seed(seed)).argsort(0)
    return order < models // 2


def distances(keep, nearer=0.0, seed=0):
    """Of a record's own scale, e^N(4, 1), times e^N(0, 0.3); ``nearer``: how much of it a member's log loses."""
    draw = torch.Generator().manual_seed(seed)
    scale = 4 + torch.randn(keep.shape[1], generator=draw)
    return (scale + 0.3 * torch.randn(keep.shape, generator=draw) - nearer * keep).exp()


@pytest.mark.parametrize("variant", ["offline", "online"])
def test_scores_are_likelihood_ratios_of_log_distances(variant):
    """By lists, one pair at a time: outside targets, and leave-one-out with partners."""
    keep, count = balanced_keep(0, 6, 20), 20
    d = distances(keep)
    d[2, 3] = 0.0  # a copy: half of the least distance that there is
    phi = [[-math.log(max(float(value), 0.5)) for value in row] for row in d]

    def score(x, n, left):
        terms = []
        for side in (True, False):
            values = [phi[m][n] for m in left if bool(keep[m, n]) == side]
            terms.append((x - statistics.median(values)) / spread[side])
        ratio = (terms[1] ** 2 - terms[0] ** 2) / 2 + math.log(spread[False] / spread[True])
        return terms[1] if variant == "offline" else ratio

    def pooled(left_of):
        result = {}
        for side in (True, False):
            squares = []
            for n in range(count):
                values = [phi[m][n] for m in left_of(n) if bool(keep[m, n]) == side]
                squares += [(value - statistics.median(values)) ** 2 for value in values]
            result[side] = statistics.fmean(squares) ** 0.5
        return result

    target = distances(keep[:1], seed=5)[0]
    spread = pooled(lambda n: range(6))
    expected = [score(-math.log(float(target[n])), n, range(6)) for n in range(count)]
    result = calibrated_nearest(d, keep, target=target, variant=variant)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    partner = partners(keep, 3, -d.double().clamp_min(0.5).log().T[None])
    result = calibrated_nearest(d, keep, variant=variant, seed=3)
    for k in range(6):

        def left(n, k=k):
            return [m for m in range(6) if m not in (k, int(partner[k, n]))]

        spread = pooled(left)
        expected = [score(phi[k][n], n, left(n)) for n in range(count)]
        torch.testing.assert_close(result[k], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_calibration_finds_what_the_distance_hides():
    """A member is nearer by half of the spread of a record's own distances, and records differ by twice as much."""
    keep, own = balanced_keep(1), balanced_keep(2)[:1]
    d, target = distances(keep, 0.3), distances(torch.cat([own, keep]), 0.3)[0]
    figures = attack_nearest(target, own[0], d[:, :], keep)
    assert figures["offline"]["role"] == "primary"
    assert figures["offline"]["auc"] > 0.7
    assert figures["online"]["auc"] > 0.7
    assert figures["uncalibrated"]["auc"] < 0.65
    for row in figures.values():
        assert row["auc_ci"][0] < row["auc"] < row["auc_ci"][1]
        assert row["recipe"]["targets"] == MODELS
        assert abs(row["recipe"]["auc"]["mean"] - row["auc"]) < 0.05  # attacked with 7 or 8 pipelines


def test_images_that_know_nothing_have_an_auc_of_one_half():
    """Mean over six draws; each has a standard error below 0.006 (8 pipelines of 1,500 records)."""
    means = {}
    for seed in range(6):
        keep = balanced_keep(seed)
        figures = attack_nearest(distances(keep, seed=9)[0], keep[0], distances(keep, seed=seed), keep, seed=seed)
        for name, row in figures.items():
            means.setdefault(name, []).append(row["recipe"]["auc"]["mean"])
    for name, values in means.items():
        assert abs(statistics.fmean(values) - 0.5) < 0.01, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distances": torch.ones(4, 9)}, r"distances must have shape \[4, 10\], got \[4, 9\]"),
        ({"distances": -torch.ones(4, 10)}, "distances must be finite and at least 0, got"),
        ({"target": torch.ones(9)}, r"target must have shape \[10\] or \[K, 10\], got"),
        ({"target": torch.full((10,), torch.nan)}, "target must be finite and at least 0, got"),
        ({"variant": "both"}, "lira: variant must be one of online, offline, got 'both'"),
    ],
)
def test_bad_arguments(change, words):
    given = {"distances": torch.ones(4, 10), "keep": balanced_keep(0, 4, 10), "target": torch.ones(10), **change}
    with pytest.raises(ValueError, match=words):
        calibrated_nearest(**given)
