"""Checkpoint Optimisation: a short Student for each generator checkpoint; the best on validation stays."""

import functools
from typing import Any

from kr_fast.recycling.budget import planner
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.runtime.progress import bar


def run(context: Context) -> dict[str, Any]:
    """Validation score of a short Student per checkpoint; the latest of equally good ones is chosen.

    In a run with a budget the Students are those of the generator's rounds, and the validation loss decides among those
    within a standard error of the best.
    """
    trials, by = Trials(context), f"val_{context.config.student_choose}"
    if context.ledger is None:
        rows = _rows(context, trials, by)
        best = max(rows, key=lambda row: (row[by], row["step"]))
    else:
        rows = [{"step": each["end"], "val_accuracy": each["val_accuracy"]} for each in context.ledger.rounds]
        losses = [each["val_loss"] for each in context.ledger.rounds]
        best = rows[planner.best_round(losses, [row["val_accuracy"] for row in rows], len(context.data.val))]
        sampling = gkd.default_sampling(context, best["step"])  # tuning begins with the same short Student
        trials.get(lambda: best["val_accuracy"], **sampling.values())
    for row in rows:
        row["chosen"] = row is best
    return {"chosen": best["step"], "rows": rows}


def _rows(context: Context, trials: Trials, by: str) -> list[dict[str, Any]]:
    teacher_model, steps = teacher.load(context), context.result("generator")["checkpoints"]
    rows = []
    with bar(len(steps), "checkpoints", "checkpoint") as progress:
        for step in steps:
            sampling = gkd.default_sampling(context, step)
            train = functools.partial(gkd.trial, context, teacher_model, sampling)
            rows.append({"step": step, by: trials.get(train, **sampling.values())})
            progress.update()
    return rows
