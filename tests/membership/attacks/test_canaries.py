"""Mislabelled canaries: how they are drawn, LiRA on them by its definition, and intervals that hold."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta

from kr_fast.membership import across_targets, attack_canaries, draw_canaries, partners
from kr_fast.membership.attacks.canaries import power
from kr_fast.report.sections import canaries as section
from kr_fast.runtime.errors import UserError

LABELS = torch.arange(400) % 7


def draw(count=40, models=16, classes=7, seed=1, labels=LABELS):
    return draw_canaries(labels, count, models=models, classes=classes, seed=seed)


def signals(keep, shift, queries=1, seed=0):
    """Noise with a level of each canary's own; members are ``shift`` higher."""
    noise = torch.Generator().manual_seed(seed)
    level = 3 * torch.randn(1, keep.shape[1], 1, generator=noise)
    return torch.randn(queries, *keep.T.shape, generator=noise) + level + shift * keep.T


def test_labels_are_wrong_and_coins_are_fair():
    drawn = draw()
    assert len(drawn.index.unique()) == 40
    assert drawn.keep.sum(0).tolist() == [8] * 40  # of 16 models
    assert drawn.keep.sum(1).tolist() == [20] * 16  # of 40 canaries
    assert torch.equal(drawn.keep, draw().keep)
    assert not torch.equal(drawn.keep, draw(seed=2).keep)
    away, inside = torch.zeros(7), torch.zeros(8, 10)
    for seed in range(200):
        one = draw(10, 8, seed=seed)
        away += torch.bincount((one.labels - LABELS[one.index]) % 7, minlength=7)
        inside += one.keep
    assert away[0] == 0
    # 2,000 labels over six others, and 200 coins for each of 80 pairs: within five standard deviations.
    assert float((away[1:] / 2000 - 1 / 6).abs().max()) < 5 * math.sqrt(5 / 36 / 2000)
    assert float((inside / 200 - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(200)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("count must be even, got 11", {"count": 11}),
        ("count must be an integer, at least 10, got 8", {"count": 8}),
        ("count must be at most 40, a tenth of the 400 examples, got 42", {"count": 42}),
        ("classes must be an integer, at least 2, got 1", {"classes": 1}),
        (r"labels must lie in \[0, 6\), got \[0, 6\]", {"classes": 6}),
    ],
)
def test_bad_draws_are_refused(words, change):
    with pytest.raises(UserError, match=f"draw_canaries: {words}"):
        draw(**change)


def test_scores_are_lira_by_its_definition():
    """Loops over float64: medians of the models that are left, one variance for a side, averaged over two queries."""
    keep = draw(10, 6).keep
    phi = signals(keep, 1.0, queries=2)
    partner, values = partners(keep, 3, phi), phi.float().double().numpy()
    scores = np.zeros((6, 10))
    for k in range(6):
        sides = {}
        for inside in (True, False):
            rest = [
                [values[a, n, m] for m in range(6) if m not in (k, int(partner[k, n])) and bool(keep[m, n]) is inside]
                for n in range(10)
                for a in range(2)
            ]
            centres = [np.median(each) for each in rest]
            residuals = [(v - c) ** 2 for each, c in zip(rest, centres, strict=True) for v in each]
            sides[inside] = np.array(centres).reshape(10, 2), math.sqrt(sum(residuals) / len(residuals))
        for n in range(10):
            terms = [
                -(((values[a, n, k] - sides[side][0][n, a]) / sides[side][1]) ** 2) / 2 - math.log(sides[side][1])
                for a in range(2)
                for side in (True, False)
            ]
            scores[k, n] = (terms[0] - terms[1] + terms[2] - terms[3]) / 2
    pairs = [
        [(s[i] > s[o]) + (s[i] == s[o]) / 2 for i in range(10) for o in range(10) if held[i] and not held[o]]
        for s, held in zip(scores, keep.numpy(), strict=True)
    ]
    found = attack_canaries(phi, keep, seed=3)
    assert found["models"] == 6
    assert found["auc"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found["sd"] == pytest.approx(np.std(np.mean(pairs, 1), ddof=1), abs=1e-12)
    outside = np.sort(scores[~keep.numpy()])[::-1]
    point = found["tpr_at_fpr"]["0.1"]  # of 30 scores of non-members three may be above it
    assert point["false_positives"] == 3
    assert point["tpr"] is None
    rates = resampled(scores, keep.numpy(), 0.1)
    low, high = np.quantile(rates, [0.025, 0.975])
    exact = exact_interval((scores[keep.numpy()] > outside[3]).mean(), 10)
    ends = min(low, exact[0]), max(high, exact[1])
    assert point["interval"] == pytest.approx(ends, abs=0.06)  # of 1,000 draws
    exact = exact_interval(np.mean(pairs), 10)
    between = across_targets(torch.from_numpy(scores), keep)["auc"]["interval"]
    ends = min(between[0], exact[0]), max(between[1], exact[1])
    assert found["auc_ci"] == pytest.approx(ends, abs=1e-12)
    assert rates.min() < (scores[keep.numpy()] > outside[3]).mean() < rates.max()


def exact_interval(share, trials):
    """Clopper and Pearson's, 95 %, as quantiles of beta distributions."""
    hits = share * trials
    return beta.ppf(0.025, hits, trials - hits + 1), beta.ppf(0.975, hits + 1, trials - hits)


def resampled(scores, keep, fpr, draws=1000):
    """TPRs at resampled models and canaries, each resample written out as lists of scores."""
    random, rates = np.random.default_rng(5), []
    for _ in range(draws):
        rows, columns = (random.integers(0, size, size) for size in scores.shape)
        values, held = scores[rows][:, columns], keep[rows][:, columns]
        outside = np.sort(values[~held])[::-1]
        above = outside[int(fpr * len(outside) + 1e-9)]
        rates.append((values[held] > above).mean())
    return np.array(rates)


def test_null_is_one_half_and_intervals_hold():
    """20 attacks that know nothing: 95 % intervals miss a level five times in fewer than 0.3 % of cases."""
    keep = draw(20, 8).keep
    found = [attack_canaries(signals(keep, 0.0, seed=seed), keep, seed=seed) for seed in range(20)]
    assert np.mean([each["auc"] for each in found]) == pytest.approx(0.5, abs=0.05)  # each has a deviation near 0.06
    for level, ends in (
        (0.5, [each["auc_ci"] for each in found]),
        (0.1, [each["tpr_at_fpr"]["0.1"]["interval"] for each in found]),
        (0.01, [each["tpr_at_fpr"]["0.01"]["interval"] for each in found]),
    ):
        assert sum(not low <= level <= high for low, high in ends) <= 4, level


def test_canaries_that_are_all_told_apart_have_an_interval_too():
    keep = draw().keep
    found = attack_canaries(signals(keep, 50.0), keep)
    assert found["auc"] == 1
    assert found["auc_ci"] == [pytest.approx(0.025 ** (1 / 40)), 1]  # 40 trials of 40
    point = found["tpr_at_fpr"]["0.1"]
    assert (point["tpr"], point["false_positives"]) == (1, 32)
    assert point["interval"] == [pytest.approx(0.025 ** (1 / 40)), 1]
    assert found["tpr_at_fpr"]["0.01"]["tpr"] is None  # on three false positives


@pytest.mark.parametrize(
    ("ends", "own", "proof"),
    [([0.9, 1], [0.5, 0.6], True), ([0.59, 1], [0.5, 0.6], False), ([0.48, 0.6], [0.3, 0.4], False)],
)
def test_power_is_an_interval_above_the_targets_own(ends, own, proof):
    found = {"models": 16, "auc": 0.95, "auc_ci": ends, "tpr_at_fpr": {}, "own": {"auc": 0.55, "auc_ci": own}}
    assert power(found, own) is proof
    audit = {"canaries": {"count": 40, "teacher": found, "student": None, "power": proof}}
    words = dict(section.blocks(audit))["text"]
    assert ("does not lie above" in words and "no proof that the attack has power" in words) is not proof
    assert f"{ends[0]:.3f}" in words
    assert f"[{own[0]:.3f}, {own[1]:.3f}]" in words
    assert list(section.blocks({})) == []
