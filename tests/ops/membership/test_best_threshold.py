"""Thresholds of best balanced accuracy: by one sort for all targets, equal to trying every value for each of them.

Ties between values, ties between thresholds (the highest counts, rates compared as they are rounded), one side missing,
values of the left-out model at the very top, infinities.
"""

import math

import pytest
import torch
from backends import on_backends
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.ops.membership.best_threshold import best_threshold


def tried(values, members, k=None):
    """By definition: every value of the others as a threshold, from high to low."""
    others = [m for m in range(values.shape[1]) if m != k]
    rows = [(float(values[n, m]), bool(members[n, m])) for n in range(len(values)) for m in others]
    inside, outside = ([v for v, member in rows if member is side] for side in (True, False))
    if not inside or not outside:
        return math.nan
    best, result = -2.0, None
    for t in sorted({v for v, _ in rows}, reverse=True):
        gain = sum(v >= t for v in inside) / len(inside) - sum(v >= t for v in outside) / len(outside)
        if gain > best:
            best, result = gain, t
    return result


def same(result, expected):
    return torch.equal(result.nan_to_num(nan=-1e9), torch.tensor(expected, dtype=torch.float64).nan_to_num(nan=-1e9))


def make(examples, models, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    members = torch.rand(examples, models, generator=g) < 0.4
    values = torch.randn(examples, models, generator=g, dtype=torch.float64) + members
    if kind == "ties":
        values = values.round()
    if kind == "one value":
        values = torch.ones_like(values)
    if kind == "infinite":
        values[::3], values[1::4] = math.inf, -math.inf
    if kind == "opposite":  # members low: no threshold but the last is any good
        values = -values - 3 * members
    if kind == "own on top":
        values[:, 0] += 100
    return values, members


@on_backends("best_threshold")
@pytest.mark.parametrize("kind", ["distinct", "ties", "one value", "infinite", "opposite", "own on top"])
@pytest.mark.parametrize(("examples", "models"), [(1, 2), (7, 3), (60, 8)])
def test_thresholds(backend, kind, examples, models):
    values, members = make(examples, models, kind)
    assert same(best_threshold(values, members), [tried(values, members, k) for k in range(models)])
    assert same(best_threshold(values, members, leave_out=False), [tried(values, members)])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(2, 4), st.integers(0, 2**31), st.integers(1, 5))
def test_few_values(examples, models, seed, distinct):
    """Small integers: thresholds that are equally good, where rounding decides, and sides that are missing."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, distinct, (examples, models), generator=g).double()
    members = torch.rand(examples, models, generator=g) < torch.rand(1, generator=g)
    assert same(best_threshold(values, members), [tried(values, members, k) for k in range(models)])


def test_a_side_that_is_missing_is_nan():
    values, members = torch.arange(6.0).view(3, 2), torch.tensor([[True, False]] * 3)
    assert best_threshold(values, members).isnan().all()  # without one model the other has one side only
    assert best_threshold(values, torch.ones_like(members), leave_out=False).isnan().all()
    assert float(best_threshold(values.float(), ~members, leave_out=False)) == 1.0
    assert best_threshold(values[:0], members[:0]).isnan().all()


def test_bits_do_not_depend_on_threads(by_threads):
    values, members = make(500, 9, "distinct")
    result = by_threads(lambda: best_threshold(values, members))
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


VALUES, MEMBERS = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: best_threshold(VALUES[0], MEMBERS), "values must have"),
        (lambda: best_threshold(VALUES.long(), MEMBERS), "values must be"),
        (lambda: best_threshold(VALUES, MEMBERS[:2]), r"members must have shape \[3, 2\]"),
        (lambda: best_threshold(VALUES, MEMBERS.float()), "members must be bool"),
        (lambda: best_threshold(VALUES * math.nan, MEMBERS), "values must not hold NaN"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((ValueError, TypeError), match=f"best_threshold: {words}"):
        call()
