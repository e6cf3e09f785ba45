"""Formal beside empirical: what attacks prove stays below the ledger's epsilon, and above it where privacy is broken.

Each canary is a record whose gradient is one coordinate of two layers, so canaries do not touch each other and the
attacker, who sees the weights after every step, has the best test there is (likelihood ratio). A coin for each says
whether it is in. So the bounds reach most of the true epsilon, and a bug shows at once.
"""

import pytest
import torch
from torch import nn

from kr_fast.membership import epsilon_clopper_pearson, epsilon_of_mu, epsilon_one_run, gaussian_mu
from kr_fast.privacy import Gaussian, Ledger, PoissonBatches, clipping, epsilon_of, make_private, noise
from kr_fast.training import SGD

CANARIES, RATE, STEPS, NOISE, DELTA, SEED = 20_000, 0.1, 16, 1.5, 1e-5, 0
LEVEL = 0.99
PER_LAYER = 0.5**0.5  # of a canary's clipped gradient, whose norm is 1


class TwoLayers(nn.Module):
    """A loss that is linear in the weights of one canary in each of two layers; its gradient is far above the norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(CANARIES, 1), nn.Embedding(CANARIES, 1)

    def forward(self, index):
        return -50.0 * (self.first(index) + self.second(index))[:, 0]


def released(sample_rate, ledger, accounted=None):
    """Coins of the canaries, and what each step released of every canary's coordinates: ``[STEPS, 2, CANARIES]``.

    ``accounted``: the sampling rate that is booked, where that is a mistake.
    """
    model = TwoLayers()
    members = torch.rand(CANARIES, generator=torch.Generator().manual_seed(SEED)) < 0.5
    records = members.nonzero()[:, 0]
    batches = PoissonBatches(len(records), sample_rate, STEPS, 10_000, seed=SEED, not_private=True)
    size = batches.expected_batch_size
    training = make_private(
        model,
        SGD(model.parameters(), lr=size),  # which takes the division by the batch back
        noise_multiplier=NOISE,
        expected_batch_size=size,
        seed=SEED,
        not_private=True,
    )
    ledger.book("teacher", Gaussian(NOISE, accounted or sample_rate, STEPS))
    steps = []
    for batch in batches:
        training.backward(model(records[batch.indices]), present=batch.present)
        if batch.last:
            before = [layer.weight[:, 0].clone() for layer in (model.first, model.second)]
            training.step()
            after = [layer.weight[:, 0] for layer in (model.first, model.second)]
            steps.append(torch.stack([new - old for new, old in zip(after, before, strict=True)]))
    return members, torch.stack(steps).double()


def bounds(members, steps, sample_rate):
    """The best of the scores by both layers and by each alone; they share the error."""

    def ratio(seen, signal):
        """Log likelihood ratio of a normal with mean ``signal`` that is drawn with ``sample_rate``, against mean 0."""
        log = (seen * signal - signal**2 / 2) / NOISE**2
        return torch.log1p(sample_rate * torch.expm1(log)).sum(0)

    scores = [ratio(steps.sum(1) * PER_LAYER, 1.0), *(ratio(steps[:, at], PER_LAYER) for at in (0, 1))]
    level = 1 - (1 - LEVEL) / len(scores)
    return {
        "clopper_pearson": max(epsilon_clopper_pearson(each, members, delta=DELTA, level=level) for each in scores),
        "one_run": max(epsilon_one_run(each, members, delta=DELTA, level=level) for each in scores),
        "gaussian": max(epsilon_of_mu(gaussian_mu(each, members, level=level), DELTA) for each in scores),
    }


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger.json", epsilon=100.0, delta=DELTA, records=CANARIES)


# Of 10,000 records on each side counts can show no more, see docs/audit/statistics.md.
LEAST = {"clopper_pearson": 0.2, "one_run": 0.05, "gaussian": 0.4}


def test_bounds_stay_below_the_ledger_s_epsilon(ledger):
    """And reach a share of it, or the tests below would say nothing."""
    found, epsilon = bounds(*released(RATE, ledger), RATE), ledger.epsilon()
    assert max(found.values()) <= epsilon
    assert {name: found[name] > share * epsilon for name, share in LEAST.items()} == dict.fromkeys(LEAST, True)


def test_noise_forgotten_in_one_layer_is_found(ledger, monkeypatch):
    add = noise.add_noise
    monkeypatch.setattr(noise, "add_noise", lambda total, *rest: add(total[:CANARIES], *rest))
    found = bounds(*released(RATE, ledger), RATE)
    assert min(found.values()) > ledger.epsilon()


def test_clipping_after_averaging_is_found(ledger, monkeypatch):
    """A sum whose mean is clipped: one record moves it by far more than the norm that the noise is made for."""
    add, size = noise.add_noise, RATE * CANARIES / 2

    def clip_and_add(total, *rest):
        total.mul_(min(1.0, size / float(total.norm())))
        add(total, *rest)

    def unclipped(rule, squares, bound, present):
        return present.to(squares.dtype), torch.zeros_like(present)

    monkeypatch.setattr(noise, "add_noise", clip_and_add)
    monkeypatch.setattr(clipping, "factors", unclipped)
    found = bounds(*released(RATE, ledger), RATE)
    assert min(found.values()) > ledger.epsilon()


def test_sampling_without_poisson_is_found(ledger):
    """Every record is in every step. Booked so, the Gaussian bound is nearly exact; booked as Poisson, all tell."""
    found = bounds(*released(1.0, ledger, accounted=RATE), 1.0)
    assert min(found.values()) > ledger.epsilon()
    epsilon = epsilon_of([Gaussian(NOISE, 1.0, STEPS)], DELTA)
    assert max(found.values()) <= epsilon
    assert found["gaussian"] > 0.9 * epsilon
