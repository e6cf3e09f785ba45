"""Shadows left out with a partner: against lists that are made anew for each pair, and with nothing to be found."""

import math
import statistics

import numpy as np
import pytest
import torch

from kr_fast.backends.codes import VARIANCES
from kr_fast.membership import (
    across_targets,
    attack_r,
    base,
    label_only,
    lira,
    partners,
    rmia_attack,
    roc,
    shadow_network,
)
from kr_fast.membership.attacks.scores import log_likelihood

MODELS, COUNT, QUERIES = 6, 23, 2


def balanced_keep(models, count, seed, inside=None):
    order = torch.rand(models, count, generator=torch.Generator().manual_seed(seed)).argsort(0)
    return order < (models // 2 if inside is None else inside)


def case(seed=0, keep=None):
    generator = torch.Generator().manual_seed(seed)
    keep = balanced_keep(MODELS, COUNT, seed) if keep is None else keep
    phi = torch.randn(QUERIES, COUNT, MODELS, generator=generator)
    phi[:, 3] = phi[:, 3].round()  # ties
    phi[:, 4] = 1.5  # all equal
    phi[0, 5, 2] = torch.inf
    phi[:, 6, 0] = 1e5
    return phi, keep, partners(keep, seed), torch.randn(QUERIES, 9, MODELS, generator=generator)


def rest(values, keep, partner, k, n, a):
    """Values of the shadows in and out that are left, as lists."""
    left = [m for m in range(len(keep)) if m not in (k, int(partner[k, n]))]
    return [[float(values[a, n, m]) for m in left if bool(keep[m, n]) == side] for side in (True, False)]


def by_pairs(score, phi, keep):
    return torch.tensor(
        [
            [statistics.fmean(score(k, n, a) for a in range(len(phi))) for n in range(phi.shape[1])]
            for k in range(len(keep))
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("inside", [4, 5])
def test_partners_are_pairs_of_both_sides(inside):
    """Of another side than the target; on sides as large each other's; each one of a side about as often."""
    keep = balanced_keep(10, 4000, 1, inside)
    partner = partners(keep, 7)
    columns = torch.arange(4000)
    assert (keep[partner, columns] != keep).all()
    if inside == 5:
        assert (partner[partner, columns] == torch.arange(10)[:, None]).all()
    assert torch.equal(partner, partners(keep, 7))
    assert not torch.equal(partner, partners(keep, 8))
    mixed = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(partners(keep[:, mixed], 7), partner[:, mixed])  # wherever an example stands
    met = torch.stack([row.bincount(minlength=10) for row in partner]).fill_diagonal_(444)
    assert met.min() > 150
    assert met.max() < 750


def test_no_partner_where_nothing_is_to_be_evened_out():
    coins = torch.rand(8, 500, generator=torch.Generator().manual_seed(2)) < 0.5
    assert (partners(coins) == -1).all()
    one_sided = balanced_keep(6, 200, 3)
    one_sided[:, 0], one_sided[:, 1] = True, False
    result = partners(one_sided)
    assert (result[:, :2] == -1).all()
    assert (result[:, 2:] >= 0).all()


def told_by_what_is_left(keep, partner):
    """Largest difference between the numbers of targets in and out that leave so many shadows in and out."""
    inside, lost = keep.sum(0)[None] - keep.long(), partner >= 0
    inside -= (lost & ~keep).long()
    left = len(keep) - 1 - lost.long()
    cells = left * (len(keep) + 1) + inside
    held, others = (torch.bincount(cells[side], minlength=len(keep) * (len(keep) + 1)) for side in (keep, ~keep))
    return int((held - others).abs().max())


@pytest.mark.parametrize(("models", "taken"), [(16, 4), (16, 8), (16, 12), (32, 8), (8, 8)])
def test_what_is_left_tells_nothing_of_the_target(models, taken):
    """Of a balanced keep the first shadows are taken, as of Teachers those that have a Student.

    To leave out the target alone puts more than 1.5 % of them on one side. Of 4 shadows there are few patterns, all
    examples of which are treated alike, so that 1.8 % may remain.
    """
    keep = balanced_keep(models, 4000, 5)[:taken]
    partner, drawn = partners(keep, 3), 4000 * taken
    assert told_by_what_is_left(keep, partner) <= (0.018 if taken == 4 else 0.003) * drawn
    assert told_by_what_is_left(keep, torch.full(keep.shape, -1)) > (0.025 if taken == 4 else 0.015) * drawn
    mixed = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(partners(keep[:, mixed], 3), partner[:, mixed])


def test_some_shadows_of_a_balanced_keep_have_a_null_of_one_half():
    """The mean over 8 of 16 shadows: 0.488 where the target alone is left out, 0.515 with a partner each time."""
    aucs = []
    for seed in range(4):
        keep = balanced_keep(16, 3000, seed)[:8]
        phi = torch.randn(1, 3000, 8, generator=torch.Generator().manual_seed(20 + seed))
        scores = lira(phi, keep, variance="fixed", partner=partners(keep, seed))
        aucs.append(statistics.fmean(roc(row, held).auc for row, held in zip(scores, keep, strict=True)))
    assert abs(statistics.fmean(aucs) - 0.5) < 0.006


@pytest.mark.parametrize("models", [4, 8])
def test_few_shadows_that_are_sure_of_all_examples_alike_have_a_null_of_one_half(models):
    """A shadow's own level is in all of its answers, so examples with the same partners do not average it out.

    With one order for all examples that the same shadows held, the mean AUC of 4 shadows had a standard deviation of
    0.06 and its interval missed 0.5 in a quarter of simulations.
    """
    missed, means = 0, []
    for seed in range(20):
        generator, keep = torch.Generator().manual_seed(100 + seed), balanced_keep(models, 1000, seed)
        level = torch.randn(1, 1, models, generator=generator)
        phi = 2 * torch.randn(1, 1000, 1, generator=generator) + level
        phi = phi + 0.3 * torch.randn(1, 1000, models, generator=generator)
        partner = partners(keep, seed, phi)
        mixed = torch.randperm(1000, generator=generator)
        assert torch.equal(partners(keep[:, mixed], seed, phi[:, mixed]), partner[:, mixed])
        assert (partners(keep, seed, phi + 1e-6) == partner).double().mean() > 0.99
        auc = across_targets(lira(phi, keep, variance="fixed", partner=partner), keep)["auc"]
        missed += not auc["interval"][0] <= 0.5 <= auc["interval"][1]
        means.append(auc["mean"])
    assert missed <= 4  # of 20 at 5 %: more once in 400
    assert statistics.pstdev(means) < 0.02


def log_student(z, n):
    freedom = 8 + n
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom) / 2
    return constant - (freedom + 1) / 2 * math.log1p(z * z / freedom)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("variant", ["online", "offline"])
def test_lira_is_that_of_the_shadows_that_are_left(variant, variance):
    phi, keep, partner, _ = case()
    values = phi.float().clamp(-1e6, 1e6)
    pooled = {}
    for k in range(MODELS):
        for side in (0, 1):
            lists = [rest(values, keep, partner, k, n, a)[side] for n in range(COUNT) for a in range(QUERIES)]
            flat = [value for each in lists for value in each]
            about = sum((value - statistics.median(each)) ** 2 for each in lists for value in each) / len(flat)
            pooled[k, side] = statistics.pvariance(flat) if variance == "fixed_raw" else about

    def score(k, n, a):
        x, terms = float(values[a, n, k]), []
        for side, each in enumerate(rest(values, keep, partner, k, n, a)):
            middle, size = statistics.median(each), len(each)
            spread = pooled[k, side]
            if variance == "per_example":
                spread = statistics.pvariance(each)
            if variance == "shrinkage":
                own = sum((value - middle) ** 2 for value in each)
                spread = (8 * spread + own) / (8 + size) * (1 + 1 / size)
            terms.append(((x - middle) / (spread**0.5 + 1e-30), spread**0.5 + 1e-30, size))
        (z_in, s_in, n_in), (z_out, s_out, n_out) = terms
        if variant == "offline":
            return z_out
        if variance == "shrinkage":
            return log_student(z_in, n_in) - log_student(z_out, n_out) + math.log(s_out / s_in)
        return (z_out**2 - z_in**2) / 2 + math.log(s_out / s_in)

    result = lira(phi, keep, variant=variant, variance=variance, partner=partner)
    expected = by_pairs(score, phi, keep)
    plain = [n for n in range(COUNT) if n not in (4, 5, 6)]
    assert torch.allclose(result[:, plain], expected[:, plain], rtol=1e-6, atol=1e-9)
    assert torch.isfinite(result).all()
    assert torch.allclose(result[:, [5, 6]], expected[:, [5, 6]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["online", "offline"])
def test_means_are_those_of_the_shadows_that_are_left(variant):
    phi, keep, partner, _ = case(1)
    p = log_likelihood(phi).exp()

    def score(k, n, a):
        inside, outside = rest(p, keep, partner, k, n, a)
        mean = statistics.fmean(outside if variant == "offline" else inside + outside)
        return math.log(float(p[a, n, k])) - math.log(mean)

    result = base(phi, keep, variant=variant, partner=partner)
    assert torch.allclose(result, by_pairs(score, phi, keep), atol=1e-9)

    correct = (phi > 0).double()

    def beyond(k, n, a):
        return float(correct[a, n, k]) - statistics.fmean(rest(correct, keep, partner, k, n, a)[1])

    assert torch.allclose(label_only(correct, keep, partner=partner), by_pairs(beyond, phi, keep), atol=1e-12)


def test_attack_r_counts_the_shadows_that_are_left():
    phi, keep, partner, _ = case(2)

    def score(k, n, a):
        return statistics.fmean(float(value <= float(phi[a, n, k])) for value in rest(phi, keep, partner, k, n, a)[1])

    result = attack_r(phi, keep, partner=partner)
    assert torch.allclose(result, by_pairs(score, phi, keep), atol=2e-6)  # the tie breaker is below 1e-6


@pytest.mark.parametrize("offline_a", [None, 0.3])
def test_rmia_is_that_of_the_shadows_that_are_left(offline_a):
    phi, keep, partner, population = case(3)
    phi, population = phi[:1], population[:1]
    p, p_z = log_likelihood(phi).exp(), log_likelihood(population).exp()
    result = rmia_attack(phi, keep, population, offline_a=offline_a, partner=partner)
    for k in range(MODELS):
        ratio_z = []
        for z in range(population.shape[1]):
            mean = statistics.fmean(float(p_z[0, z, m]) for m in range(MODELS) if m != k)
            mean = mean if offline_a is None else ((1 + offline_a) * mean + 1 - offline_a) / 2
            ratio_z.append(float(p_z[0, z, k]) / mean)
        for n in range(COUNT):
            inside, outside = (statistics.fmean(side) for side in rest(p, keep, partner, k, n, 0))
            prior = (inside + outside) / 2
            prior = prior if offline_a is None else ((1 + offline_a) * outside + 1 - offline_a) / 2
            expected = sum(float(p[0, n, k]) / prior >= ratio for ratio in ratio_z)
            assert int(result[k, n]) == expected


def attacks_on(models, seed):
    """Every attack that compares with shadows, on 3,000 examples of a difficulty of their own, nothing memorised."""
    generator, count = torch.Generator().manual_seed(seed), 3000
    keep = balanced_keep(models, count, seed)
    phi = 2 * torch.randn(1, count, 1, generator=generator) + torch.randn(1, count, models, generator=generator)
    z = 2 * torch.randn(1, 300, 1, generator=generator) + torch.randn(1, 300, models, generator=generator)
    given = {"keep": keep, "partner": partners(keep, seed)}
    variances = VARIANCES if models > 4 else VARIANCES[1:]
    return keep, {
        **{f"lira {name}": lira(phi, **given, variance=name) for name in variances},
        "lira offline": lira(phi, **given, variant="offline", variance="fixed"),
        "rmia": rmia_attack(phi, population=z, **given),
        "rmia offline": rmia_attack(phi, population=z, offline_a=0.33, **given),
        "base": base(phi, **given),
        "base offline": base(phi, **given, variant="offline"),
        "attack_r": attack_r(phi, **given),
        "label_only": label_only((phi > 0).double(), **given),
    }


@pytest.mark.parametrize("models", [4, 8, 16])
def test_scores_that_know_nothing_have_an_auc_of_one_half(models):
    """Within 0.005 or four standard errors; with the target alone left out online LiRA lies 0.09, 0.04, 0.015 below."""
    sums = {}
    for seed in range(6 if models < 16 else 3):
        keep, result = attacks_on(models, seed)
        for name, scores in result.items():
            auc = statistics.fmean(roc(row, held).auc for row, held in zip(scores, keep, strict=True))
            sums.setdefault(name, []).append(auc)
    for name, aucs in sums.items():
        error = 4 * 0.007 / len(aucs) ** 0.5  # of a mean over targets that share their records: 0.005 to 0.007 at 4
        assert abs(statistics.fmean(aucs) - 0.5) < max(0.005, error), name


def test_leaving_out_the_target_alone_has_a_null_below_one_half():
    keep, _ = attacks_on(8, 0)
    phi = torch.randn(1, 3000, 8, generator=torch.Generator().manual_seed(9))
    plain, evened = lira(phi, keep, variance="fixed"), lira(phi, keep, variance="fixed", partner=partners(keep))
    aucs = [statistics.fmean(roc(row, held).auc for row, held in zip(s, keep, strict=True)) for s in (plain, evened)]
    assert aucs[0] < 0.475
    assert abs(aucs[1] - 0.5) < 0.012


def test_an_attack_network_does_not_learn_who_was_left_out():
    """Ten kinds of example, told apart by their features, nothing memorised: without partners the AUC is far below."""
    keep = balanced_keep(4, 10, 5).repeat_interleave(60, 1)
    features = torch.eye(10).repeat_interleave(60, 0)[:, None].expand(600, 4, 10).clone()
    aucs = []
    for partner in (None, partners(keep)):
        scores = shadow_network(features, keep, partner=partner, targets=(0, 1))
        aucs.append(np.mean([roc(row, held).auc for row, held in zip(scores, keep, strict=False)]))
    assert aucs[0] < 0.2
    assert abs(aucs[1] - 0.5) < 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.int(), "partner must be int64"),
        (lambda p: p[:, :-1], "partner must be int64"),
        (lambda p: p + 9, r"partner must lie in \[-1, 6\)"),
        (lambda p: torch.arange(6)[:, None].expand(6, COUNT).clone(), "partner must be of the other side"),
    ],
)
def test_bad_partners(change, words):
    phi, keep, partner, _ = case()
    with pytest.raises(ValueError, match=f"lira: {words}"):
        lira(phi, keep, variance="fixed", partner=change(partner))
    with pytest.raises(ValueError, match="base: partner must be left out where target is given"):
        base(phi, keep, target=phi, partner=partner)
    with pytest.raises(ValueError, match=r"partners: keep must have shape \[M, N\]"):
        partners(keep[0])
    with pytest.raises(ValueError, match=r"partners: phi must have shape \[A, 23, M\], got \[2, 22, 6\]"):
        partners(keep, 0, phi[:, :-1])
