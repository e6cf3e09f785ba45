"""The ROC op: integer counts, equal to pair counting and to scikit-learn whatever the ties."""

import math

import numpy as np
import pytest
import torch
from backends import on_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from kr_fast.membership.statistics.curve import roc as curve_of
from kr_fast.ops.membership.roc import roc


def pairs(scores, members):
    """Twice the Mann-Whitney count over all pairs: an integer."""
    inside, outside = scores[members], scores[~members]
    return int(2 * (inside[:, None] > outside[None, :]).sum() + (inside[:, None] == outside[None, :]).sum())


def make(count, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(count, generator=generator) < 0.4
    members[:2] = torch.tensor([True, False])
    scores = torch.randn(count, dtype=torch.float64, generator=generator) + 0.5 * members
    if kind == "ties":
        scores = (scores * 2).round() / 2
    if kind == "all tied":
        scores = torch.zeros_like(scores)
    if kind == "infinite":
        scores[::5], scores[1::7] = math.inf, -math.inf
    if kind == "tiny":  # subnormal and huge numbers side by side
        scores = scores * torch.tensor([1e-310, 1e300], dtype=torch.float64)[torch.arange(count) % 2]
    return scores, members


@on_backends("roc")
@pytest.mark.parametrize("kind", ["distinct", "ties", "all tied", "infinite", "tiny"])
@pytest.mark.parametrize("count", [2, 3, 500])
def test_counts(backend, kind, count):
    scores, members = make(count, kind)
    thresholds, tp, fp = roc(scores, members)
    distinct = scores.unique().flip(0)
    assert torch.equal(thresholds, distinct)
    assert tp.tolist() == [int((scores[members] >= t).sum()) for t in distinct]
    assert fp.tolist() == [int((scores[~members] >= t).sum()) for t in distinct]


@pytest.mark.parametrize("kind", ["distinct", "ties", "all tied", "infinite", "tiny"])
def test_auc_is_the_pair_count(kind):
    scores, members = make(400, kind, seed=1)
    total = 2 * int(members.sum()) * int((~members).sum())
    assert curve_of(scores, members).auc == pairs(scores, members) / total


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-320, 0.5, 1.0, math.inf]), st.booleans()),
        min_size=2,
        max_size=60,
    )
)
def test_heavy_ties(rows):
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    members = torch.tensor([member for _, member in rows])
    if members.all() or not members.any():
        return
    curve = curve_of(scores, members)
    assert curve.auc == pairs(scores, members) / (2 * curve.positives * curve.negatives)


@pytest.mark.parametrize("kind", ["distinct", "ties", "all tied"])
def test_same_points_as_scikit_learn(kind):
    scores, members = make(3000, kind, seed=2)
    curve = curve_of(scores, members)
    fpr, tpr, _ = roc_curve(members.numpy(), scores.numpy(), drop_intermediate=False)
    assert np.array_equal(curve.fpr, fpr)
    assert np.array_equal(curve.tpr, tpr)
    assert abs(curve.auc - roc_auc_score(members.numpy(), scores.numpy())) < 1e-12


def test_zero_has_one_sign():
    thresholds, tp, fp = roc(torch.tensor([0.0, -0.0]), torch.tensor([True, False]))
    assert (thresholds.tolist(), tp.tolist(), fp.tolist()) == ([0.0], [1], [1])


def test_float32_keeps_its_order_and_strided_input_its_values():
    scores, members = make(200, "distinct")
    low = scores.float()
    assert torch.equal(roc(low, members)[1], roc(low.double(), members)[1])
    both = torch.stack([scores, scores], 1)
    assert torch.equal(roc(both[:, 0], members)[2], roc(scores, members)[2])


@pytest.mark.parametrize(
    ("scores", "members", "error", "words"),
    [
        ([1.0, 2.0], torch.tensor([True, False]), TypeError, "scores must be a tensor"),
        (torch.zeros(2, 1), torch.tensor([True, False]), ValueError, "scores must have 1 dimension"),
        (torch.zeros(2), torch.tensor([1, 0]), TypeError, "members must be bool"),
        (torch.zeros(3), torch.tensor([True, False]), ValueError, "one entry for each of the 3 scores"),
        (
            torch.zeros(2),
            torch.tensor([True, True]),
            ValueError,
            "members must hold members and non-members, got '2 of",
        ),
        (torch.zeros(2), torch.tensor([False, False]), ValueError, "members must hold members and non-members"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), ValueError, "members must hold members and non-members"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([True, False]), ValueError, "scores must not hold NaN"),
    ],
)
def test_bad_input(scores, members, error, words):
    with pytest.raises(error, match=f"roc: .*{words}"):
        roc(scores, members)
