"""Stage 5, Tuning on validation: noise scale, guidance, solver steps and confidence filter, one after the other."""

import dataclasses
from typing import Any

from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import gkd, teacher
from kr_fast.runtime.progress import bar

KNOBS = ("noise_scale", "guidance_scale", "num_inference_steps", "confidence")


def run(context: Context) -> dict[str, Any]:
    """Coordinate search: a value replaces the one in use where its short Student is strictly better."""
    c = context.config
    master = teacher.load(context)
    trials = Trials(context)  # the chosen checkpoint's trial is the first one here
    best = gkd.default_sampling(context, context.result("checkpoints")["chosen"])
    rows: list[dict[str, Any]] = []

    def score(sampling: gkd.Sampling) -> float:
        values = dataclasses.asdict(sampling)
        found = trials.get(lambda: gkd.trial(context, master, sampling), **values)
        rows.append({**values, "val_accuracy": found})
        progress.update()
        return found

    with bar(1 + sum(len(getattr(c, f"tune_{knob}")) for knob in KNOBS), "tuning", "trial") as progress:
        best_score = score(best)
        for knob in KNOBS:
            for value in getattr(c, f"tune_{knob}"):
                if value == getattr(best, knob):
                    progress.update()
                    continue
                candidate = dataclasses.replace(best, **{knob: value})
                found = score(candidate)
                if found > best_score:
                    best, best_score = candidate, found
    chosen = dataclasses.asdict(best)
    for row in rows:
        row["chosen"] = all(row[key] == value for key, value in chosen.items())
    return {"sampling": chosen, "rows": rows}
