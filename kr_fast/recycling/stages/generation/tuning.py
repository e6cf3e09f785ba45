"""Tuning on validation of how images are drawn: one value after the other, or quasi-random settings (tune_trials)."""

import functools
from collections.abc import Callable
from typing import Any

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.score_error import score_error
from kr_fast.recycling.stages.generation.halving import rounds, successive_halving
from kr_fast.recycling.stages.generation.sampling import Sampling, default_sampling, trial_key
from kr_fast.recycling.stages.generation.search_space import (
    PARAMETERS,
    drawn_settings,
    one_at_a_time,
    row,
    tried,
    with_value,
)
from kr_fast.runtime import seeds
from kr_fast.runtime.progress import bar

REPEATS = 2  # short Students of other seeds, of the best setting and of the usual one

# (setting, length, repeat) -> score on validation.
Score = Callable[[Sampling, int, int], float]


def run(context: Context) -> dict[str, Any]:
    """The setting that stays, and every trial."""
    c, checkpoint = context.config, context.result("checkpoints")
    usual = default_sampling(context, checkpoint["chosen"], checkpoint.get("ema_length", 0.0))
    if c.epsilon:  # no choice by private images
        return {"sampling": usual.values(), "rows": []}
    teacher_model = teacher.load(context)
    trials = Trials(context)  # the chosen checkpoint's trial is the first one here
    rows: list[dict[str, Any]] = []

    def score(sampling: Sampling, length: int = 1, repeat: int = 0) -> float:
        key, train = trial_key(sampling, length, repeat), functools.partial(gkd.trial, context, teacher_model, sampling)
        value = trials.get(functools.partial(train, length, repeat), **key)
        further = {"round": length.bit_length(), "length": length, "repeat": repeat} if c.tune_trials else {}
        seconds = {"seconds": trials.seconds(**key)} if c.tune_trials else {}
        rows.append({**row(c, sampling), **further, f"val_{c.student_choose}": value, **seconds, "sampling": sampling})
        progress.update()
        return value

    decision: dict[str, Any] = {}
    with bar(sum(count for count, _ in trials_of(c, usual)), "tuning", "trial") as progress:
        if c.tune_trials:
            best, decision = _search(context, usual, score)
        else:
            best = _one_after_the_other(context, usual, score)
    marked = [{**each, "chosen": each["sampling"] == best} for each in rows]
    for each in marked:
        del each["sampling"]
    return {"sampling": best.values(), "rows": marked, **({"decision": decision} if decision else {})}


def trials_of(c: RecycleConfig, usual: Sampling) -> list[tuple[int, int]]:
    """(trials at most, their length) of each round."""
    if c.epsilon:
        return []
    if not c.tune_trials:
        return [(1 + len(one_at_a_time(c, usual)), 1)]
    plan = rounds(len(candidates(c, usual)))
    return [*plan, (2 * REPEATS, plan[-1][1])] if plan[0][0] > 1 else plan


def expected(c: RecycleConfig, usual: Sampling) -> list[tuple[Sampling, int, float]]:
    """(setting, length, how many trials of both) besides the first trial, before it is known which settings stay."""
    if c.epsilon:
        return []
    if not c.tune_trials:
        return [(each, 1, 1.0) for each in one_at_a_time(c, usual)]
    settings = candidates(c, usual)
    planned = [(each, length, count / len(settings)) for count, length in trials_of(c, usual) for each in settings]
    return [*planned, (usual, 1, -1.0)]


def _one_after_the_other(context: Context, best: Sampling, score: Score) -> Sampling:
    """Coordinate search: a value replaces the one in use where its short Student is strictly better.

    In a run with a budget it has to be better by more than a standard error.
    """
    c = context.config
    best_score = score(best)
    for name in PARAMETERS:
        for value in tried(c, name):
            candidate = with_value(c, best, name, value)
            candidate_score = score(candidate)
            if candidate_score > best_score + (0.0 if context.ledger is None else score_error(context, best_score)):
                best, best_score = candidate, candidate_score
    return best


def candidates(c: RecycleConfig, usual: Sampling) -> list[Sampling]:
    """Drawn settings, and the usual one, which is last: of equal scores it is the better one."""
    return [*drawn_settings(c, usual, c.tune_trials - 1, seeds.derive(c.seed, "tuning")), usual]


def _search(context: Context, usual: Sampling, score: Score) -> tuple[Sampling, dict[str, Any]]:
    """Successive halving; what is left replaces the usual setting if it is better beyond the noise in other trials."""
    best, trials = successive_halving(candidates(context.config, usual), lambda each, length: score(each, length, 0))
    if best == usual:
        return usual, {}
    means = {}
    for name, setting in (("usual", usual), ("best", best)):
        again = [score(setting, trials[-1].length, repeat) for repeat in range(1, REPEATS + 1)]
        means[name] = sum(again) / REPEATS
    limit = score_error(context, means["usual"])
    replaced = means["best"] > means["usual"] + limit
    return best if replaced else usual, {**means, "noise": limit, "repeats": REPEATS, "replaced": replaced}
