"""Tests of released images: against the definitions, on copies, and where nothing is to be found."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kr_fast.data import load_uncut
from kr_fast.data.duplicates import digests
from kr_fast.ensemble import ModelArray
from kr_fast.membership import AuditData, TargetSignals, released_tests
from kr_fast.membership.attacks.medoids import cluster_medoids
from kr_fast.membership.attacks.released_tests import TESTS, compare_released
from kr_fast.membership.inputs.features import penultimate
from kr_fast.models import classifier
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return load_uncut("digits")[2]["all"].images


def noisy(images, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (images + spread * torch.randn(images.shape, generator=generator)).clamp(0, 255).round().to(torch.uint8)


def definitions(images, members, synthetic):
    """The figures by their definitions in float64, of sides that are equally large."""
    x, s, inside = images.flatten(1).double(), synthetic.flatten(1).double(), members.numpy()
    d = torch.cdist(s, x, compute_mode="donot_use_mm_for_euclid_dist").numpy() / math.sqrt(x.shape[1])
    near, out = d.min(0), d[:, ~inside]
    pairs = near[inside][:, None] - near[~inside][None]
    closest = d == d.min(1, keepdims=True)
    content = torch.tensor(sorted(range(len(images)), key=digests(images).__getitem__))
    order = content[torch.randperm(len(images), generator=seeds.generator(0, "released tests"))]
    references, compared = order[~members[order]].chunk(2)
    ratio = (d / d[:, references].min(1)[:, None]).min(0)
    rank = math.ceil(len(compared) / 100)
    two = {True: np.sort(d[:, inside], 1)[:, :2], False: np.sort(out, 1)[:, :2]}
    return {
        "auc": float((pairs < 0).mean() + (pairs == 0).mean() / 2),
        "dcr": [float(np.quantile(two[side][:, 0], q)) for side in (True, False) for q in (0.5, 0.05)],
        "nndr": [float(np.median(each[:, 0] / each[:, 1])) for each in two.values()],
        "share": float((closest[:, inside].sum(1) / closest.sum(1)).mean()),
        "count": int((ratio[inside] < np.sort(ratio[compared])[rank - 1]).sum()),
        "ratio": ratio,
    }


@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 2, 1)])  # few ties; many: four pixels of few levels
def test_figures_are_those_of_the_definitions(digits, shape):
    pool, made = digits[:240], noisy(digits[300:400], 40)
    if shape != (8, 8, 1):
        pool, made = (part[:, 2:6:2, 2:6:2] // 32 * 32 for part in (pool, made))
    members = torch.arange(240) % 2 == 0
    result = released_tests(pool, members, made)
    with np.errstate(divide="ignore", invalid="ignore"):
        figures, expected = result.figures, definitions(pool, members, made)
    assert figures["nearer"]["auc"] == pytest.approx(expected["auc"], abs=1e-12)
    rows = [figures["dcr"][side][key] for side in ("members", "held_out") for key in ("median", "low")]
    assert rows == pytest.approx(expected["dcr"], rel=1e-6, abs=1e-9)
    assert figures["dcr"]["share"] == pytest.approx(expected["share"], abs=1e-9)
    assert figures["dcr"]["expected"] == 0.5
    if shape == (8, 8, 1):  # elsewhere both distances of a ratio can be 0
        medians = [figures["nndr"][side]["median"] for side in ("members", "held_out")]
        assert medians == pytest.approx(expected["nndr"], rel=1e-6)
        assert result.ratio.numpy() == pytest.approx(expected["ratio"], rel=1e-5)
        assert figures["memorised"]["count"] == expected["count"]
    at = torch.arange(240)
    gaps = (pool[at].flatten(1).double() - made[result.nearest].flatten(1).double()).square().mean(1).sqrt()
    assert torch.allclose(result.distance, gaps, rtol=1e-6)


def test_figures_do_not_depend_on_the_order_of_records_or_on_blocks(digits, monkeypatch):
    members, made = torch.arange(300) < 180, noisy(digits[400:500], 30)
    result = released_tests(digits[:300], members, made)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("kr_fast.data.distances.MOST_BYTES", 8 * 300 * 7)  # seven released images at a time
    turned = released_tests(digits[:300][order], members[order], made)
    assert turned.figures == result.figures
    assert torch.equal(turned.ratio, result.ratio[order])
    assert torch.equal(turned.nearest, result.nearest[order])


def test_copies_of_members_are_found(digits):
    """60 of 300 released images are members with little noise, two without any."""
    members = torch.arange(500) < 300
    made = noisy(digits[600:900], 25)
    made[:60] = noisy(digits[:60], 5)
    made[:2] = digits[:2]
    result = released_tests(digits[:500], members, made)
    memorised = result.figures["memorised"]
    assert memorised["p"] < 1e-6
    assert 55 <= memorised["count"] <= 60 + 5 * memorised["expected"]
    assert memorised["copies"] == {"members": 2, "held_out": 0}
    rows = result.closest(members, 40)
    assert [row["position"] for row in rows[:2]] == [0, 1]
    assert all(row["synthetic"] == row["position"] < 60 for row in rows)
    assert [row["ratio"] for row in rows] == sorted(row["ratio"] for row in rows)
    # A fifth of copies is too little for the share of closest records. Where all are copies every test sees it.
    assert result.figures["dcr"]["p"] > 0.05
    result = released_tests(digits[:500], members, noisy(digits[:300], 5)).figures
    assert result["nearer"]["p"] < 1e-6
    assert result["dcr"]["p"] < 1e-6
    assert result["nearer"]["interval"][0] > 0.9


def test_p_values_are_uniform_where_nothing_leaks(digits):
    """200 cuts of 200 digits, 150 released from other ones: a test at 5 % rejects 10, more than 20 once in 1,000."""
    rejected, counts, expected = dict.fromkeys(TESTS, 0), [], []
    members = torch.arange(200) < 120
    for seed in range(200):
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        figures = released_tests(digits[order[:200]], members, noisy(digits[order[200:350]], 15, seed)).figures
        for test in TESTS:
            rejected[test] += figures[test]["p"] <= 0.05
        counts.append(figures["memorised"]["count"])
        expected.append(figures["memorised"]["expected"])
    assert max(rejected.values()) <= 20, rejected
    assert rejected["nearer"] >= 2  # a test that never rejects would pass too: less than 2 once in 2,000
    # The count is negative hypergeometric, of standard deviation 3.3; the mean of 200 lies within four errors.
    assert np.mean(counts) == pytest.approx(np.mean(expected), abs=4 * 3.3 / 200**0.5)


def test_clusters_without_a_held_out_image_do_not_count_as_memorised():
    """A pool of 40 clusters, of which a cut leaves some without a held-out image: 150 cuts, with nothing to find.

    p is below 0.01 in 7 or more of them once in 1,000.
    """
    draw = torch.Generator().manual_seed(0)
    centres, members, rejected = torch.randn(40, 8, generator=draw), torch.arange(650) < 500, 0
    for seed in range(150):
        at = torch.randint(40, (850,), generator=draw)
        points = centres[at] + 0.02 * torch.randn(850, 8, generator=draw)
        figures = released_tests(points[:650], members, points[650:], seed=seed).figures
        rejected += figures["memorised"]["p"] <= 0.01
    assert rejected <= 6


def test_one_image_of_each_group_is_tested(digits):
    """Members in 75 copies beside single others: as images they reject too often, as groups they do not.

    With nothing to find the smallest corrected p of 20 audits is below 0.05 in one, in 5 or more once in 400.
    """
    rejected = {True: 0, False: 0}
    for seed in range(20):
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        pool = torch.cat([noisy(digits[order[:4]].repeat(75, 1, 1, 1), 4, seed), digits[order[12:112]]])
        members, groups = torch.arange(400) < 300, np.concatenate([np.tile(np.arange(4), 75), np.arange(4, 104)])
        shared = {"images": pool, "synthetic": {"made": noisy(digits[order[160:310]], 15, seed)}}
        for grouped in (True, False):
            target = TargetSignals({"phi": torch.zeros(1, 400)})
            data = AuditData({}, {"t": target}, members, groups=groups if grouped else None, **shared)
            figures, tests = compare_released(data, seed=seed)
            made = figures["made"]
            rejected[grouped] += made["p"] <= 0.05
            assert made["by_group"] == grouped
            assert (made["pixels"]["members"], made["pixels"]["held_out"]) == ((4, 100) if grouped else (300, 100))
            assert len(tests["made"].ratio) == 400  # the closest pairs are those of all images
    assert rejected[True] <= 4
    assert rejected[False] >= 5


def test_medoids_are_the_images_nearest_to_their_cluster():
    """Three separate heaps: one medoid each, which no other image of its heap beats in squared distances."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    points = centres.repeat_interleave(30, 0) + torch.randn(90, 2, generator=generator)
    drawn = [cluster_medoids(points, 3, seed=seed) for seed in range(20)]
    at = next(each for each in drawn if len({int(index) // 30 for index in each}) == 3)
    for index in at.tolist():
        heap = torch.arange(index // 30 * 30, index // 30 * 30 + 30)
        sums = torch.cdist(points[heap], points[heap]).square().sum(1)
        assert int(heap[sums.argmin()]) == index
    assert len(cluster_medoids(points[:2], 5)) == 2
    assert len(cluster_medoids(torch.zeros(4, 2, 2, 1, dtype=torch.uint8), 3)) == 1


def test_features_are_what_the_last_layer_reads(digits):
    torch.manual_seed(0)
    model = classifier("resnet8", num_classes=10, in_channels=1, width=4)
    array = ModelArray([model])
    features = penultimate(array, digits[:50])
    assert features.shape == (50, 16)
    logits = nn.functional.linear(features, model.head.weight, model.head.bias)
    assert torch.allclose(logits, array(digits[:50])[0], atol=1e-4)
    assert not model.head._forward_hooks
    for other in (
        nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()),
    ):
        assert penultimate(ModelArray([other]), digits[:8]) is None
    # Features are tested as images are; what is near there is near here.
    members = torch.arange(200) < 100
    copies = penultimate(array, noisy(digits[:100], 2))
    assert released_tests(penultimate(array, digits[:200]), members, copies).figures["memorised"]["p"] < 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x, m: released_tests(x, m, x[:0]),
            r"synthetic must be uint8 \[S, 8, 8, 1\] with S > 0, got uint8 \[0, 8",
        ),
        (lambda x, m: released_tests(x, m, x[:, :4]), r"synthetic must be uint8 \[S, 8, 8, 1\] with S > 0"),
        (lambda x, m: released_tests(x, m, x.float()), "synthetic must be uint8"),
        (
            lambda x, m: released_tests(x, m | True, x),
            "members must hold at least 2 members and as many held-out images",
        ),
        (lambda x, m: released_tests(x, m[:5], x), r"members must have shape \[20\], got \[5\]"),
        (lambda x, m: released_tests(x[:0], m, x), r"images must have shape \[N, ...\] with N > 0"),
        (lambda x, m: released_tests(x.float(), m, x.float() * torch.nan), "synthetic must be finite, got NaN or inf"),
        (lambda x, m: released_tests(x, m, x, level=2), r"level must be in \(0, 1\), got 2"),
        (lambda x, m: released_tests(x, m, x, seed=-1), "seed must be an integer, at least 0"),
    ],
)
def test_bad_input(digits, call, words):
    with pytest.raises(UserError, match=f"^released_tests: {words}"):
        call(digits[:20], torch.arange(20) < 8)
