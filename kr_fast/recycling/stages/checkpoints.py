"""Checkpoint Optimisation: a short Student for each generator checkpoint; the best on validation stays."""

import functools
from dataclasses import asdict
from typing import Any

from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import gkd, teacher
from kr_fast.runtime.progress import bar


def run(context: Context) -> dict[str, Any]:
    """Validation accuracy of a short Student per checkpoint; the latest of equally good ones is chosen."""
    teacher_model = teacher.load(context)
    steps = context.result("generator")["checkpoints"]
    trials = Trials(context)
    rows = []
    with bar(len(steps), "checkpoints", "checkpoint") as progress:
        for step in steps:
            sampling = gkd.default_sampling(context, step)
            train = functools.partial(gkd.trial, context, teacher_model, sampling)
            rows.append({"step": step, "val_accuracy": trials.get(train, **asdict(sampling))})
            progress.update()
    best = max(rows, key=lambda row: (row["val_accuracy"], row["step"]))
    for row in rows:
        row["chosen"] = row is best
    return {"chosen": best["step"], "rows": rows}
