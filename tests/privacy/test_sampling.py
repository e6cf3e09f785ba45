"""Poisson batches: who is in them, in what parts, and after a resume."""

import numpy as np
import pytest
import torch
from scipy import stats

from kr_fast.privacy import PoissonBatches
from kr_fast.runtime.errors import UserError

SEEDED = {"seed": 3, "not_private": True}


def logical(batches):
    """The drawn records of each logical batch."""
    drawn, now = [], []
    for batch in batches:
        now += batch.indices[batch.present].tolist()
        if batch.last:
            drawn.append(now)
            now = []
    assert now == []
    return drawn


def test_each_record_is_drawn_independently():
    records, rate, steps = 200, 0.1, 500
    drawn = logical(PoissonBatches(records, rate, steps, 16, **SEEDED))
    assert len(drawn) == steps
    assert all(len(set(each)) == len(each) for each in drawn)  # no record twice in a logical batch
    hits = np.zeros((steps, records), bool)
    for step, each in enumerate(drawn):
        hits[step, each] = True
    sizes = hits.sum(1)
    deviation = (records * rate * (1 - rate)) ** 0.5
    assert abs(sizes.mean() - 20) < 4 * deviation / steps**0.5
    assert stats.chisquare(*_binned(sizes, records, rate)).pvalue > 1e-3
    assert abs(np.corrcoef(hits[:-1].ravel(), hits[1:].ravel())[0, 1]) < 4 / hits[1:].size ** 0.5
    assert abs(np.corrcoef(hits[:, 0::2].ravel(), hits[:, 1::2].ravel())[0, 1]) < 4 / (hits.size / 2) ** 0.5


def _binned(sizes, records, rate):
    edges = np.array([0, 15, 17, 19, 21, 23, 25, records + 1])
    found = np.histogram(sizes, edges)[0]
    return found, len(sizes) * np.diff(stats.binom.cdf(edges - 1, records, rate))


def test_parts_have_one_size_and_hold_each_record_once():
    batches = list(PoissonBatches(50, 1.0, 2, 16))
    assert [batch.last for batch in batches] == [False, False, False, True] * 2
    assert [batch.step for batch in batches] == [0] * 4 + [1] * 4
    assert {len(batch.indices) for batch in batches} == {16}
    assert [int(batch.present.sum()) for batch in batches] == [16, 16, 16, 2] * 2
    assert logical(PoissonBatches(50, 1.0, 2, 16)) == [list(range(50))] * 2


def test_empty_batches_are_steps():
    batches = list(PoissonBatches(3, 1e-9, 4, 2))
    assert len(batches) == 4
    assert all(batch.last and not batch.present.any() for batch in batches)


def test_resumes_within_a_logical_batch():
    whole = PoissonBatches(40, 0.5, 3, 4, **SEEDED)
    expected = list(whole)
    for stop in range(len(expected)):
        first = PoissonBatches(40, 0.5, 3, 4, **SEEDED)
        done = [batch for _, batch in zip(range(stop), first, strict=False)]
        second = PoissonBatches(40, 0.5, 3, 4, **SEEDED)
        second.load_state_dict(first.state_dict())
        rest = list(second)
        for batch, other in zip(done + rest, expected, strict=True):
            assert torch.equal(batch.indices, other.indices)
            assert (batch.last, batch.step) == (other.last, other.step)


def test_what_was_drawn_is_not_drawn_again():
    """Without a seed the rest of an interrupted batch still comes from the state."""
    first = PoissonBatches(100, 0.5, 1, 8)
    start = next(iter(first))
    second = PoissonBatches(100, 0.5, 1, 8)
    second.load_state_dict(first.state_dict())
    assert not set(start.indices.tolist()) & set(logical(second)[0])


def test_draws_differ_from_run_to_run():
    assert logical(PoissonBatches(100, 0.5, 1, 8)) != logical(PoissonBatches(100, 0.5, 1, 8))
    assert PoissonBatches(100, 0.5, 1, 8).is_private


def test_seeded_draws_are_marked():
    batches = PoissonBatches(100, 0.5, 1, 8, **SEEDED)
    assert not batches.is_private
    assert "not private" in repr(batches)
    assert batches.state_dict()["private"] is False
    with pytest.raises(UserError, match="private must be True"):
        PoissonBatches(100, 0.5, 1, 8).load_state_dict(batches.state_dict())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 0.5, 1, 8), {}, "PoissonBatches: records must be a whole number of at least 1, got 0"),
        ((None, 0.5, 1, 8), {}, "records must be a whole number"),  # data of unknown size
        ((9, 0.0, 1, 8), {}, r"sample_rate must be in \(0, 1\], got 0"),
        ((9, 1.5, 1, 8), {}, r"sample_rate must be in \(0, 1\]"),
        ((9, float("nan"), 1, 8), {}, "sample_rate must be a finite number"),
        ((9, 0.5, -1, 8), {}, "steps must be"),
        ((9, 0.5, 1, 0), {}, "physical_batch_size must be"),
        ((9, 0.5, 1, 8), {"seed": 3}, "seed must be left out"),
        ((9, 0.5, 1, 8), {"not_private": True}, "not_private must be left out"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(UserError, match=message):
        PoissonBatches(*arguments, **options)


def test_a_state_of_another_run_is_refused():
    state = PoissonBatches(100, 0.5, 1, 8).state_dict()
    with pytest.raises(UserError, match="sample_rate must be 0.25"):
        PoissonBatches(100, 0.25, 1, 8).load_state_dict(state)
