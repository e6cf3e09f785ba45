"""The whole run: stages in order, each timed, journalled and done once.

Under several Accelerate processes the generator trains data-parallel and the shadow models are shared out; the other
stages run on rank 0 while the others wait. Rank 0 alone writes.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kr_fast import data
from kr_fast.recycling import (
    auditing,
    checkpoints,
    dataset,
    generator,
    gkd,
    reporting,
    shadow_students,
    shadows,
    student,
    teacher,
    tuning,
)
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.runtime import files, manifest, state
from kr_fast.runtime.journal import Journal

# (name, function, runs on every rank)
STAGES: tuple[tuple[str, Callable[[Context], dict], bool], ...] = (
    ("data", dataset.run, False),
    ("teacher", teacher.run, False),
    ("generator", generator.run, True),
    ("checkpoints", checkpoints.run, False),
    ("tuning", tuning.run, False),
    ("gkd", gkd.run, False),
    ("student", student.run, False),
    ("shadows", shadows.run, True),
    ("shadow_students", shadow_students.run, True),
    ("audit", auditing.run, False),
    ("report", reporting.run, False),
)


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """What :func:`recycle` returns: the figures of ``metrics.json`` and where everything lies."""

    metrics: dict[str, Any]
    out: Path
    report: Path

    def __repr__(self) -> str:
        accuracy = ", ".join(f"{name} {self.metrics[name]['test_accuracy']:.4f}" for name in ("teacher", "student"))
        return f"Result(test accuracy: {accuracy}; report: {self.report})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict and the first table of the report."""
        from kr_fast.report import render, run_audit

        blocks = [("table", run_audit.headline(self.metrics)), ("text", run_audit.verdict(self.metrics))]
        return render.fragment([*blocks, ("text", f"Report: {self.report}")])


def recycle(config: RecycleConfig) -> Result:
    """Run Knowledge Recycling, or continue the run in ``config.out``.

    Returns: the metrics and the path of the report; see docs/method.md for the stages and the files.
    Raises: UserError for bad input, before anything is written; FileNotFoundError for missing data.
    Source: Lomurno and Matteucci, "Synthetic Image Learning: Preserving Performance and Preventing Membership
        Inference Attacks", Pattern Recognition Letters 190, 2025.
    """
    runtime = state.current()
    start = time.perf_counter()
    loaded = data.load(
        config.data, seed=config.seed, val_fraction=config.val_fraction, test_fraction=config.test_fraction
    )
    out = Path(config.out)
    context = Context(config, out, runtime, loaded, Journal(out))
    dataset.check(context)
    teacher.build(context)  # a Teacher that does not fit the data is refused before anything is written
    try:
        with runtime.main_first() as main:
            if main:
                manifest.open_run(out, config.record())
        context.journal.reload()
        for name, run, everywhere in STAGES:
            _stage(context, name, run, everywhere, start)
            start = time.perf_counter()
        return Result(files.read_json(context.folder.metrics), out, reporting.pages(context) / "report.html")
    finally:
        manifest.release()


def _stage(context: Context, name: str, run: Callable[[Context], dict], everywhere: bool, start: float) -> None:
    runtime = context.runtime
    if runtime.broadcast(context.journal.done(name) is not None):
        context.journal.reload()
        return
    if everywhere:
        result = run(context)
        if runtime.is_main:
            context.journal.finish(name, time.perf_counter() - start, result)
    else:
        with runtime.main_first() as main:
            if main:
                result = run(context)
                context.journal.finish(name, time.perf_counter() - start, result)
    runtime.barrier()
    context.journal.reload()
