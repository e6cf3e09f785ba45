"""Tuning on validation: noise scale, guidance, solver steps and confidence filter, one after the other."""

from typing import Any

from kr_fast.recycling.budget import planner
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.sampling import Sampling, default_sampling
from kr_fast.recycling.stages.generation.search_space import PARAMETERS, row, tried, with_value
from kr_fast.runtime.progress import bar


def run(context: Context) -> dict[str, Any]:
    """Coordinate search: a value replaces the one in use where its short Student is strictly better.

    In a run with a budget it has to be better by more than a standard error.
    """
    c = context.config
    teacher_model = teacher.load(context)
    trials = Trials(context)  # the chosen checkpoint's trial is the first one here
    best = default_sampling(context, context.result("checkpoints")["chosen"])
    rows: list[tuple[Sampling, float]] = []

    def score(sampling: Sampling) -> float:
        value = trials.get(lambda: gkd.trial(context, teacher_model, sampling), **sampling.values())
        rows.append((sampling, value))
        progress.update()
        return value

    def noise(accuracy: float) -> float:
        return planner.standard_error(accuracy, len(context.data.val))

    total = 1 + sum(len(tried(c, name)) for name in PARAMETERS)
    with bar(total, "tuning", "trial") as progress:
        best_score = score(best)
        for name in PARAMETERS:
            for value in tried(c, name):
                candidate = with_value(c, best, name, value)
                candidate_score = score(candidate)
                if candidate_score > best_score + (0.0 if context.ledger is None else noise(best_score)):
                    best, best_score = candidate, candidate_score
    return {
        "sampling": best.values(),
        "rows": [{**row(c, each), f"val_{c.student_choose}": value, "chosen": each == best} for each, value in rows],
    }
