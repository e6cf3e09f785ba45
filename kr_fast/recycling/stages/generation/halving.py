"""Successive halving: many candidates are tried shortly, and each better half again for twice as long.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016,
figure 3, with trainings that begin anew.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate's score in a round, counted from 1, whose trainings were ``length`` times as long as the shortest."""

    candidate: Any
    round: int
    length: int
    score: float


def rounds(count: int) -> list[tuple[int, int]]:
    """(candidates, length) of each round with ``count`` candidates: 5 -> (5, 1), (3, 2), (2, 4)."""
    plan = [(count, 1)]
    while (left := -(-plan[-1][0] // 2)) > 1:
        plan.append((left, 2 * plan[-1][1]))
    return plan


def halve(candidates: Sequence[Any], scores: Sequence[float]) -> list[Any]:
    """The better half, in their order; of equal scores the later candidate is the better one."""
    ranked = sorted(range(len(candidates)), key=lambda at: (scores[at], at), reverse=True)
    return [candidates[at] for at in sorted(ranked[: -(-len(candidates) // 2)])]


def successive_halving(candidates: Sequence[Any], score: Callable[[Any, int], float]) -> tuple[Any, list[Trial]]:
    """The candidate that is left, and every trial.

    Args:
        score: (candidate, length) -> how good the candidate is after a training of this length, higher for better.
    """
    trials, left = [], list(candidates)
    for number, (_, length) in enumerate(rounds(len(left)), 1):
        scores = [score(candidate, length) for candidate in left]
        pairs = zip(left, scores, strict=True)
        trials += [Trial(candidate, number, length, value) for candidate, value in pairs]
        left = halve(left, scores)
    return left[0], trials
