"""Checkpoint Optimisation: a short Student for each generator checkpoint; the best on validation stays.

By successive halving, where that is asked for: each better half of the candidates is tried again by Students of twice
as many periods. They begin anew, in one cycle of the rate as the run's Student: continued ones would be restarted, and
compared by what no Student of the run does. That costs less than one more round.
"""

from typing import Any

from kr_fast.recycling.budget import planner
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.generator import checkpoint_steps
from kr_fast.recycling.stages.generation.halving import Trial, rounds, successive_halving
from kr_fast.recycling.stages.generation.sampling import Sampling, default_sampling, trial_key
from kr_fast.runtime.progress import bar


def run(context: Context) -> dict[str, Any]:
    """Validation score of a short Student per candidate; the latest of equally good ones is chosen.

    Candidates are the checkpoints, each with the usual average of the weights and with those of ``ema_lengths``. In a
    run with a budget the Students are those of the generator's rounds, and the validation loss decides among those
    within a standard error of the best.
    """
    trials, c = Trials(context), context.config
    if context.ledger is not None:
        rows = [{"step": each["end"], "val_accuracy": each["val_accuracy"]} for each in context.ledger.rounds]
        losses = [each["val_loss"] for each in context.ledger.rounds]
        best = rows[planner.best_round(losses, [row["val_accuracy"] for row in rows], len(context.data.val))]
        sampling = default_sampling(context, best["step"])  # tuning begins with the same short Student
        trials.get(lambda: best["val_accuracy"], **sampling.values())
        return {"chosen": best["step"], "rows": [{**row, "chosen": row is best} for row in rows]}
    steps = context.result("generator")["checkpoints"]
    if c.epsilon:  # no choice by private images
        (context.folder.state / "generator.pt").unlink(missing_ok=True)  # its stage is recorded
        return {"chosen": steps[-1], "rows": []}
    lengths = sorted(c.ema_lengths, reverse=True)  # of equally good averages the usual one stays, else the shortest
    candidates = [default_sampling(context, step, length) for step in steps for length in (*lengths, 0.0)]
    best, done = _tried(context, trials, candidates)
    rows = []
    for each in done:
        row: dict[str, Any] = {"step": each.candidate.checkpoint}
        row |= {"ema_length": each.candidate.ema_length} if lengths else {}
        row |= {"round": each.round, "length": each.length} if c.checkpoint_halving else {}
        row[f"val_{c.student_choose}"] = each.score
        if c.checkpoint_halving:
            row["seconds"] = trials.seconds(**trial_key(each.candidate, each.length))
        rows.append({**row, "chosen": each.candidate == best and each.round == done[-1].round})
    return {"chosen": best.checkpoint, "rows": rows, **({"ema_length": best.ema_length} if lengths else {})}


def trials_of(c: RecycleConfig) -> list[tuple[int, int]]:
    """(candidates, length of their Students) of each round."""
    if c.epsilon:
        return []
    count = len(checkpoint_steps(c.generator_steps, c.checkpoints)) * (1 + len(c.ema_lengths))
    return rounds(count) if c.checkpoint_halving else [(count, 1)]


def _tried(context: Context, trials: Trials, candidates: list[Sampling]) -> tuple[Sampling, list[Trial]]:
    teacher_model, c = teacher.load(context), context.config

    def score(sampling: Sampling, length: int) -> float:
        def train() -> float:
            return gkd.trial(context, teacher_model, sampling, length)

        value = trials.get(train, **trial_key(sampling, length))
        progress.update()
        return value

    with bar(sum(count for count, _ in trials_of(c)), "checkpoints", "trial") as progress:
        if c.checkpoint_halving:
            return successive_halving(candidates, score)
        done = [Trial(each, 1, 1, score(each, 1)) for each in candidates]
    return max(enumerate(done), key=lambda pair: (pair[1].score, pair[0]))[1].candidate, done
