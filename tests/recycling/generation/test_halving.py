"""Successive halving: rounds, ties, and the order of trials."""

import pytest

from kr_fast.recycling.stages.generation.halving import halve, rounds, successive_halving


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(1, 1)]),
        (2, [(2, 1)]),
        (3, [(3, 1), (2, 2)]),
        (5, [(5, 1), (3, 2), (2, 4)]),
        (8, [(8, 1), (4, 2), (2, 4)]),
    ],
)
def test_rounds(count, expected):
    assert rounds(count) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2, 0], "ac"), ([1, 1, 1, 1], "cd"), ([2, 1, 1, 0], "ac"), ([5, 1, 2], "ac"), ([0], "a")],
)
def test_the_better_half_stays_and_of_equals_the_later(scores, expected):
    assert "".join(halve("abcd"[: len(scores)], scores)) == expected


def test_each_round_trains_longer_and_leaves_the_better_half():
    """The best candidate of long trainings is not the best of short ones."""
    asked = []

    def score(candidate, length):
        asked.append((candidate, length))
        return {"a": 5, "b": 1, "c": 4 + length, "d": 2, "e": 3}[candidate]

    best, trials = successive_halving("abcde", score)
    assert best == "c"
    assert asked == [*((each, 1) for each in "abcde"), *((each, 2) for each in "ace"), *((each, 4) for each in "ac")]
    assert [(each.candidate, each.length) for each in trials] == asked
    assert [each.round for each in trials] == [1] * 5 + [2] * 3 + [3] * 2
    assert [each.score for each in trials[-2:]] == [5, 8]
