"""The pitfalls of differentially private training that jax_privacy's guide lists, one test each, by their names there.

Two of the list lie elsewhere: "accounting and batch selection" and "neighbouring relation" are the ledger's.
"""

import math

import pytest
import torch
from private_cases import error, losses, network
from torch import nn

from kr_fast.privacy import PoissonBatches, make_private, noise
from kr_fast.runtime.errors import UserError


def private_of(model, **options):
    given = {"noise_multiplier": 0.0, "expected_batch_size": 4.0, **options}
    return make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), **given)


def sums_of(model, x, labels, present=None, **options):
    private = private_of(model, **options)
    private.backward(losses(model, x, labels), present=present)
    private.restore()
    return private.state_dict()["sums"]


def test_division_by_the_private_batch_size():
    """The drawn size divides nothing: a record alone moves the weights as far as among others."""
    model, x, labels = network("images")
    alone = sums_of(model, x[:1], labels[:1])
    among = sums_of(model, x, labels, present=torch.arange(6) == 0)
    assert error(among, alone.double()) < 1e-5


def test_sensitivity_alignment():
    """The noise is that of the bound: sigma C, whatever the batch."""
    model, _, _ = network("images")
    for bound in (0.5, 8.0):
        private = private_of(
            model, noise_multiplier=2.0, max_grad_norm=bound, expected_batch_size=1.0, seed=1, not_private=True
        )
        before = torch.cat([p.flatten() for p in model.parameters()])
        private.step()
        moved = torch.cat([p.flatten() for p in model.parameters()]) - before
        assert float(moved.std()) == pytest.approx(2 * bound, rel=0.05)
        private.restore()


def test_batch_selection_is_poisson():
    batches = PoissonBatches(1000, 0.5, 8, 10_000)
    assert len({int(batch.present.sum()) for batch in batches}) > 1  # no fixed size


def test_public_and_private_metadata():
    """What divides comes from declared numbers, not from the data that was drawn."""
    batches = PoissonBatches(1000, 0.25, 1, 64)
    assert batches.expected_batch_size == 250
    next(iter(batches))
    assert batches.expected_batch_size == 250


def test_zero_sized_batches():
    model, x, labels = network("images")
    private = private_of(model, noise_multiplier=1.0)
    before = torch.cat([p.flatten() for p in model.parameters()])
    private.step()  # no batch at all
    private.backward(losses(model, x, labels), present=torch.zeros(6, dtype=torch.bool))
    assert not private.state_dict()["sums"].any()
    private.step()
    after = torch.cat([p.flatten() for p in model.parameters()])
    assert private.steps == 2
    assert torch.isfinite(after).all()
    assert (after != before).all()  # noise all the same


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", ["images", "resnet"])
def test_non_finite_gradients(name, value):
    """Such a record contributes zero and is counted; the others' sum is what it would be without it."""
    model, x, labels = network(name)
    others = sums_of(model, x, labels, present=torch.arange(6) != 2)
    x = x.clone()
    x[2] = value
    x[2, 0, 0, 0] = -value
    model.eval()
    private = private_of(model)
    loss = losses(model, x, labels)
    private.backward(loss * torch.where(torch.arange(6) == 2, value, 1.0))
    assert private.not_finite == 1
    assert torch.isfinite(private.state_dict()["sums"]).all()
    assert error(private.state_dict()["sums"], others.double()) < 1e-5
    private.backward(losses(model, x, labels), present=torch.arange(6) != 2)  # absent and not finite
    assert private.not_finite == 1
    assert error(private.state_dict()["sums"], 2 * others.double()) < 1e-5


def test_gradient_accumulation():
    """Parts of a logical batch are clipped record by record and noised once."""
    model, x, labels = network("images")
    whole = sums_of(model, x, labels)
    private = private_of(model)
    present = torch.tensor([True, True, False, True])
    for rows in ([0, 1, 0, 2], [3, 4, 0, 5]):  # the third stands in for none
        private.backward(losses(model, x[rows], labels[rows]), present=present)
    assert error(private.state_dict()["sums"], whole.double()) < 1e-5
    private.step()
    assert private.steps == 1


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(8), nn.SyncBatchNorm(8), nn.InstanceNorm2d(8, track_running_stats=True)]
)
def test_cross_example_operations(layer):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), layer)
    with pytest.raises(UserError, match=r"make_private: model must .*got 1: "):
        private_of(model)


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.place, self.last, self.mix = nn.Linear(4, 4), nn.Embedding(6, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        return self.last(self.mix(self, self.first(x)))


@pytest.mark.parametrize(
    ("mix", "name"),
    [
        (lambda model, x: x - x.mean(0), "first"),
        (lambda model, x: x.flip(0), "first"),
        (lambda model, x: (x[:, None] + model.place(torch.arange(6))).tanh().mean(1), "place"),  # as many as rows
    ],
)
def test_cross_example_functions(mix, name):
    """No layer tells them, but gradients of records that are not present do."""
    model, x, labels = Mixing(mix), torch.randn(6, 4), torch.arange(6) % 3
    private = private_of(model)
    with pytest.raises(UserError, match=f"backward: layer {name} must have .* got one of a row that is not present"):
        private.backward(losses(model, x, labels), present=torch.arange(6) != 2)
    assert not private.state_dict()["sums"].any()


def test_auxiliary_information():
    """What leaves the training object by name is either noised or said to be private."""
    private = private_of(network("images")[0])
    assert "not_finite" in type(private).__doc__
    for method in (type(private).state_dict, PoissonBatches.state_dict):
        assert "where" in method.__doc__
        assert "kept" in method.__doc__


def test_rng_injection():
    """No seed of a library decides the noise, and one that is given marks the result."""
    results = []
    for _ in range(2):
        model, _, _ = network("images")
        torch.manual_seed(0)
        private = private_of(model, noise_multiplier=1.0)
        private.step()
        assert private.is_private
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert not torch.equal(*results)
    model, _, _ = network("images")
    with pytest.raises(UserError, match="seed must be left out"):
        private_of(model, seed=3)
    private = private_of(model, seed=3, not_private=True)
    assert not private.is_private
    assert "not private" in repr(private)
    assert private.state_dict()["private"] is False


def test_no_noise_is_not_private():
    private = private_of(network("images")[0])
    assert private.why_not == "not private: no noise is added"
    assert "not private" in repr(private)


def test_floating_point_robustness():
    """Results lie on a grid that does not depend on the sum."""
    for start in (0.0, 0.1, 12345.678):
        total = torch.full((64,), start)
        noise.add_noise(total, 1.0, None)
        assert torch.equal(total.double() * 2.0**20, (total.double() * 2.0**20).round())


def test_finite_precision_error():
    """Clip factors leave room for the rounding of norms: in float64 none is above the bound."""
    from kr_fast.privacy import clipping

    norms = torch.rand(10_000) * 100 + 1
    scale, _ = clipping.factors("flat", norms.square(), 1.0, torch.ones(10_000, dtype=torch.bool))
    assert float((scale.double() * norms.double()).max()) <= 1
