"""The bootstrap op: the same integers on every backend and thread count, and resamples of the data they come from.

Members 1 and 3: fewer than the four words of a counter; 64 and 65: around the 64 words of an AVX-512 vector group.
"""

import pytest
import torch
from backends import on_backends

from kr_fast.backends import registry
from kr_fast.membership import roc
from kr_fast.ops.membership.bootstrap_auc import bootstrap_auc


def make(members, others, step=0.25, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(members + others) < members
    scores = torch.randn(members + others, generator=generator) + inside
    curve = roc((scores / step).round() * step if step else scores, inside)
    return curve, *(torch.from_numpy(side) for side in curve.groups)


@on_backends("bootstrap_auc", "cpu")
@pytest.mark.parametrize("members", [1, 3, 64, 65, 257])
@pytest.mark.parametrize("step", [None, 0.25, 100.0])
def test_integers_of_the_reference(backend, members, step):
    _, inside, outside = make(members, 130, step)
    limits, options = torch.tensor([0, 3, 40, 130]), {"replicates": 20, "seed": 2**63 + 5}
    auc, hits = bootstrap_auc(inside, outside, limits, **options)
    with registry.forced("reference"):
        expected = bootstrap_auc(inside, outside, limits, **options)
    assert torch.equal(auc, expected[0])
    assert torch.equal(hits, expected[1])
    assert bool((hits[:, -1] == members).all())  # all false positives allowed: all members


def test_bits_do_not_depend_on_threads(by_threads):
    _, inside, outside = make(200, 300)
    result = by_threads(lambda: bootstrap_auc(inside, outside, torch.tensor([5]), replicates=50))
    assert torch.equal(result[0][0], result[1][0])
    assert torch.equal(result[0][1], result[2][1])


def test_centre_and_spread():
    """Mean of the replicates near the AUC; their spread near DeLong's."""
    curve, inside, outside = make(400, 500, None)
    auc, _ = bootstrap_auc(inside, outside, torch.zeros(0, dtype=torch.int64), replicates=4000, seed=3)
    low, high = curve.auc_interval()
    assert abs(float(auc.mean()) - curve.auc) < 0.05 * (high - low)
    assert float(auc.std()) == pytest.approx((high - low) / 3.92, rel=0.06)


def test_seeds_differ():
    _, inside, outside = make(50, 50)
    none = torch.zeros(0, dtype=torch.int64)
    first, second = (bootstrap_auc(inside, outside, none, replicates=9, seed=seed)[0] for seed in (1, 2**32 + 1))
    assert not torch.equal(first, second)


GOOD = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((GOOD.int(), GOOD, GOOD), {}, TypeError, "inside must be int64"),
        ((GOOD, -GOOD, GOOD), {}, ValueError, "outside must be >= 0, got -2"),
        ((GOOD, GOOD[:1], GOOD), {}, ValueError, r"outside must have shape \[2\]"),
        ((GOOD, GOOD * 0, GOOD), {}, ValueError, "outside must count 1 to"),
        ((GOOD, GOOD, GOOD.flip(0)), {}, ValueError, "limits must be ascending"),
        ((GOOD, GOOD, GOOD), {"replicates": 0}, ValueError, "replicates must be in"),
        ((GOOD, GOOD, GOOD), {"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=f"bootstrap_auc: {words}"):
        bootstrap_auc(*arguments, **({"replicates": 2} | options))
