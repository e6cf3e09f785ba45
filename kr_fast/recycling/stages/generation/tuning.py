"""Tuning on validation: noise scale, guidance, solver steps and confidence filter, one after the other."""

import dataclasses
from typing import Any

from kr_fast.recycling.budget import planner
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.runtime.progress import bar

TUNED_PARAMETERS = ("noise_scale", "guidance_scale", "num_inference_steps", "confidence")


def run(context: Context) -> dict[str, Any]:
    """Coordinate search: a value replaces the one in use where its short Student is strictly better.

    In a run with a budget it has to be better by more than a standard error.
    """
    c = context.config
    teacher_model = teacher.load(context)
    trials = Trials(context)  # the chosen checkpoint's trial is the first one here
    best = gkd.default_sampling(context, context.result("checkpoints")["chosen"])
    rows: list[dict[str, Any]] = []

    def score(sampling: gkd.Sampling) -> float:
        values = dataclasses.asdict(sampling)
        value = trials.get(lambda: gkd.trial(context, teacher_model, sampling), **values)
        rows.append({**values, f"val_{c.student_choose}": value})
        progress.update()
        return value

    def noise(accuracy: float) -> float:
        return planner.standard_error(accuracy, len(context.data.val))

    total = 1 + sum(len(getattr(c, f"tune_{name}")) for name in TUNED_PARAMETERS)
    with bar(total, "tuning", "trial") as progress:
        best_score = score(best)
        for name in TUNED_PARAMETERS:
            for value in getattr(c, f"tune_{name}"):
                if value == getattr(best, name):
                    progress.update()
                    continue
                candidate = dataclasses.replace(best, **{name: value})
                candidate_score = score(candidate)
                if candidate_score > best_score + (0.0 if context.ledger is None else noise(best_score)):
                    best, best_score = candidate, candidate_score
    chosen = dataclasses.asdict(best)
    for row in rows:
        row["chosen"] = all(row[key] == value for key, value in chosen.items())
    return {"sampling": chosen, "rows": rows}
