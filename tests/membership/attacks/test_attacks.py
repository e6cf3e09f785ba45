"""Every attack against its definition in a few lines of float64 numpy, leave-one-out and for outside targets."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kr_fast.membership import (
    attack_p,
    attack_r,
    base,
    generated_density,
    label_only,
    lira_carlini2021,
    nearest_synthetic,
    quantile_regression,
    rmia_attack,
    roc,
    shadow_network,
    threshold_per_class,
)

A, N, M, Z, K = 2, 60, 8, 41, 3


@pytest.fixture(scope="module", name="data")
def _data():
    """(phi, keep, target, population, target population)."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(M, N, generator=g).argsort(0).argsort(0) < M // 2
    hard = torch.randn(N, 1, generator=g)
    phi = 1 + hard + torch.randn(A, N, M, generator=g) + 1.5 * keep.T
    target = 1 + hard + torch.randn(A, N, K, generator=g) + 1.5 * (torch.arange(N) < 30)[:, None]
    return phi, keep, target, torch.randn(A, Z, M, generator=g), torch.randn(A, Z, K, generator=g)


def cases(data):
    """(phi [A, N], others' phi [A, N, m] and keep [N, m], population of both) of each target."""
    phi, keep, target, population, own = (part.numpy() for part in data)
    for k in range(M):
        o = np.arange(M) != k
        yield phi[:, :, k], phi[:, :, o], keep[o].T, population[:, :, k], population[:, :, o]
    for k in range(K):
        yield target[:, :, k], phi, keep.T, own[:, :, k], population


def both(attack, data, *rest, **options):
    phi, keep, target = data[:3]
    return torch.cat([attack(phi, keep, *rest, **options), attack(phi, keep, *rest, target=target, **options)])


def p_of(phi):
    return 1 / (1 + np.exp(-phi.astype(np.float64)))


@pytest.mark.parametrize("variant", ["online", "offline"])
def test_base(data, variant):
    result = both(base, data, variant=variant)
    for row, (x, others, held, *_) in zip(result, cases(data), strict=True):
        mask = np.ones_like(held) if variant == "online" else ~held
        mean = np.where(mask, p_of(others), 0).sum(2) / mask.sum(1)
        assert np.allclose(row, (np.log(p_of(x)) - np.log(mean)).mean(0), atol=1e-6)


@pytest.mark.parametrize("offline_a", [None, 0.3])
@pytest.mark.parametrize("queries", [1, 2])
def test_rmia(data, offline_a, queries):
    phi, keep, target, population, own = (part if part.dtype == torch.bool else part[:queries] for part in data)
    options = {"gamma": 1.1, "offline_a": offline_a}
    result = torch.cat(
        [
            rmia_attack(phi, keep, population, **options),
            rmia_attack(phi, keep, population, target=target, target_population=own, **options),
        ]
    )
    for row, (x, others, held, z, other_z) in zip(result, cases((phi, keep, target, population, own)), strict=True):
        p, q = p_of(others), p_of(other_z).mean(2)
        inside, outside = ((p * side).sum(2) / side.sum(1) for side in (held, ~held))
        prior = (inside + outside) / 2
        if offline_a is not None:
            prior, q = ((1 + offline_a) * outside + 1 - offline_a) / 2, ((1 + offline_a) * q + 1 - offline_a) / 2
        votes = ((p_of(x) / prior)[:, :, None] / (p_of(z) / q)[:, None, :] >= 1.1).sum(0)
        assert np.array_equal(row.floor().numpy(), (2 * votes > queries).sum(1))
        assert len(row.unique()) == N  # ties are broken


def test_attack_r(data):
    result = both(attack_r, data)
    for row, (x, others, held, *_) in zip(result, cases(data), strict=True):
        share = (((others <= x[:, :, None]) & ~held).sum(2) / (~held).sum(1)).mean(0)
        assert np.allclose(row, share, atol=1.1e-6)
        assert bool((row.numpy() > share).all())


def test_attack_p_ranks_as_the_loss(data):
    target, own = data[2][:1], data[4][:1]
    for k, row in enumerate(attack_p(target, own)):
        expected = (own[0, :, k] <= target[0, :, k, None]).double().mean(1)
        assert torch.equal(row, expected)


def test_label_only(data):
    correct = tuple((part > 1).float() if part.dtype != torch.bool else part for part in data)
    result = both(label_only, correct)
    for row, (x, others, held, *_) in zip(result, cases(correct), strict=True):
        assert np.allclose(row, (x - (others * ~held).sum(2) / (~held).sum(1)).mean(0))


def test_threshold_per_class(data):
    labels = torch.arange(N) % 3
    phi, keep, target = data[:3]
    result = torch.cat(
        [
            threshold_per_class(phi, keep, labels),
            threshold_per_class(phi, keep, labels, target=target),
        ]
    )
    for row, (x, others, held, *_) in zip(result, cases(data), strict=True):
        for label in range(3):
            at = labels.numpy() == label
            values, inside = others.astype(np.float64).mean(0)[at].ravel(), held[at].ravel()
            gains = [(values[inside] >= t).mean() - (values[~inside] >= t).mean() for t in values]
            gap = x.astype(np.float64).mean(0)[at] - row.numpy()[at]  # the threshold
            assert np.ptp(gap) < 1e-9
            assert (values[inside] >= gap[0] - 1e-9).mean() - (values[~inside] >= gap[0] - 1e-9).mean() == max(gains)


def test_an_infinite_threshold_per_class_still_divides():
    """Members are certain, others are not: the threshold is infinite, at it a target is a member, below it none."""
    keep = torch.arange(M * N).reshape(M, N) % 2 == 0
    phi = torch.where(keep.T, torch.inf, 0.0)[None]
    target = torch.tensor([torch.inf, 1.0, -torch.inf]).repeat(N, 1)[None]
    result = threshold_per_class(phi, keep, torch.zeros(N, dtype=torch.int64), target=target)
    assert (result[0] == 0).all()
    assert (result[2] < result[1]).all()
    assert (result[1] < 0).all()


@pytest.mark.parametrize("fix_variance", [False, True])
@pytest.mark.parametrize("variant", ["online", "offline"])
def test_reference_code(data, variant, fix_variance):
    """To the bit: lists of shadows in model order, cut to the least count; the members' variance for both sides."""
    result = both(lira_carlini2021, data, variant=variant, fix_variance=fix_variance)
    for row, (x, others, held, *_) in zip(result, cases(data), strict=True):
        scores = np.ascontiguousarray(others.astype(np.float64).transpose(2, 1, 0))
        sides = [[scores[mask[n], n, :] for n in range(N)] for mask in (held, ~held)]
        lengths = [min(map(len, side)) for side in sides]
        inside, outside = (np.array([part[:n] for part in side]) for side, n in zip(sides, lengths, strict=True))
        if variant == "online":
            deviations = [np.std(inside)] * 2 if fix_variance else [np.std(inside, 1), np.std(outside, 1)]
            pr_in = -norm.logpdf(x.T, np.median(inside, 1), deviations[0] + 1e-30)
            expected = (pr_in - -norm.logpdf(x.T, np.median(outside, 1), deviations[1] + 1e-30)).mean(1)
        else:
            deviation = np.std(outside) if fix_variance else np.std(outside, 1)
            expected = norm.logpdf(x.T, np.median(outside, 1), deviation + 1e-30).mean(1)
        assert np.array_equal(row.numpy(), -expected)


def test_shadow_network_learns_what_a_member_looks_like():
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(6, 400, generator=g) < 0.5
    features = torch.randn(400, 6, 3, generator=g)
    features[:, :, 1] += 2 * keep.T  # AUC of the best score: Phi(sqrt(2)) = 0.921
    result = shadow_network(features, keep, targets=(0, 3))
    assert result.shape == (2, 400)
    assert min(roc(result[i], keep[k]).auc for i, k in enumerate((0, 3))) > 0.88
    outside = shadow_network(features[:, :5], keep[:5], target=features[:, 5:])
    assert roc(outside[0], keep[5]).auc > 0.88


def test_quantile_regression_takes_off_the_difficulty():
    """phi depends on the features far more than on membership: the raw value is blind, the attack is not."""
    g = torch.Generator().manual_seed(2)
    keep = torch.rand(8, 600, generator=g) < 0.5
    features = torch.rand(600, 2, generator=g)
    phi = (20 * features[:, :1] + 0.5 * torch.randn(600, 8, generator=g) + 1.5 * keep.T)[None]
    result = quantile_regression(phi, keep, features)
    assert roc(result[0], keep[0]).auc > 0.8 > 0.65 > roc(phi[0, :, 0], keep[0]).auc
    assert torch.equal(quantile_regression(phi, keep, features, target=phi[:, :, :2]), result[:2])


def test_released_images():
    """A generator that copies members with noise is found by both attacks, one that does not is not."""
    g = torch.Generator().manual_seed(3)
    pool, reference = torch.randn(200, 6, 6, 1, generator=g), torch.randn(300, 6, 6, 1, generator=g)
    members = torch.arange(200) < 100
    copies = pool[:100].repeat(3, 1, 1, 1) + 0.3 * torch.randn(300, 6, 6, 1, generator=g)
    honest = torch.randn(300, 6, 6, 1, generator=g)
    for attack in (nearest_synthetic, generated_density):
        assert roc(attack(pool, copies, reference=reference), members).auc > 0.95
        low, high = roc(attack(pool, honest, reference=reference), members).auc_interval(0.999)
        assert low <= 0.5 <= high
    distances = (pool.flatten(1).double()[:, None] - copies.flatten(1).double()[None]).norm(dim=2).min(1).values
    assert torch.allclose(nearest_synthetic(pool, copies), -distances, atol=1e-4)
    assert float(nearest_synthetic(pool[:1], pool)[0]) == 0.0


def test_an_example_without_shadows_gives_no_evidence(data):
    phi, keep, target = data[0], data[1].clone(), data[2]
    keep[:, 0], keep[:, 1] = True, False
    assert bool((base(phi, keep, variant="offline", target=target)[:, 0] == 0).all())
    assert bool((label_only(phi, keep, target=target)[:, 0] == 0).all())
    scores = rmia_attack(phi, keep, data[3], target=target, target_population=data[4])
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, k: base(p, k / 2), "base: keep must be bool, or hold 0 and 1 only"),
        (lambda p, k: base(p, k.T), r"base: keep must have shape \[M, N\]"),
        (lambda p, k: attack_r(p * torch.nan, k), "attack_r: signals must not hold NaN"),
        (lambda p, k: label_only(p[:, :, :1], k[:1]), "label_only: signals must hold at least 2 shadows"),
        (lambda p, k: base(p, k, variant="both"), "base: variant must be one of online, offline, got both"),
        (lambda p, k: rmia_attack(p, k, p[:1]), r"rmia: population must have shape \[2, Z, 8\]"),
        (lambda p, k: rmia_attack(p, k, p, offline_a=2), r"rmia: offline_a must be in \[0, 1\]"),
        (lambda p, k: rmia_attack(p, k, p, target=p), "target_population must be given with target"),
        (lambda p, k: threshold_per_class(p, k, torch.zeros(3)), r"labels must be integers \[60\]"),
        (lambda p, k: quantile_regression(p, k, torch.zeros(3, 2)), r"features must have shape \[60, F\]"),
        (lambda p, k: lira_carlini2021(p, k | True), "leave every example a shadow on each side"),
        (lambda p, k: nearest_synthetic(p, p[:, :3]), "synthetic must have shape"),
        (lambda p, k: attack_p(p, p[:, :0]), "population must have shape"),
    ],
)
def test_bad_input(data, call, words):
    with pytest.raises(ValueError, match=words):
        call(data[0], data[1])
