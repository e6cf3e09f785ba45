"""Tails of chance, against all ways to draw the members."""

import itertools

import numpy as np
import pytest

from kr_fast.membership.statistics.permutation import count_before, sum_above


@pytest.mark.parametrize(("members", "others", "rank"), [(4, 3, 1), (4, 3, 2), (3, 5, 5), (6, 2, 1)])
def test_members_before_an_other_by_all_orders(members, others, rank):
    total = members + others
    places = list(itertools.combinations(range(total), others))  # of the others
    before = np.array([each[rank - 1] - (rank - 1) for each in places])
    for count in range(members + 2):
        assert count_before(count, rank, members, others) == pytest.approx(float((before >= count).mean()), abs=1e-12)
    assert before.mean() == pytest.approx(rank * members / (others + 1))  # what reports call the expected number


def test_the_sum_of_members_by_many_draws():
    """Skewed weights, as of records that are the closest of many images: p within two hundredths of 20,000 draws."""
    generator = np.random.default_rng(0)
    weights = generator.geometric(0.4, 120).astype(float) - 1
    weights[:3] = 15
    orders = generator.permuted(np.tile(np.arange(120), (20_000, 1)), axis=1)
    for drawn in (30, 60, 90):
        sums = weights[orders[:, :drawn]].sum(1)
        for share in (0.5, 0.9, 0.99):
            observed = np.sort(sums)[int(share * len(sums))]
            members = np.zeros(120, dtype=bool)
            members[orders[np.argmin(np.abs(sums - observed)), :drawn]] = True
            mid = (sums > observed).mean() + (sums == observed).mean() / 2
            assert sum_above(weights, members) == pytest.approx(mid, abs=0.02)


def test_nothing_to_tell_is_one_half():
    members = np.arange(10) < 4
    assert sum_above(np.ones(10), members) == 0.5
    assert sum_above(np.arange(10.0), np.ones(10, dtype=bool)) == 0.5
    assert sum_above(-np.arange(10.0), members) < 0.02
