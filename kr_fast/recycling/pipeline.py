"""The whole run: stages in order, each timed, journalled and done once.

Under several Accelerate processes the generator, and a Teacher with epsilon, train data-parallel and the shadow models
are shared out; the other stages run on rank 0 while the others wait. Rank 0 alone writes.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kr_fast.data import Source, read
from kr_fast.membership.verdict.limits import MOVABLE as OF_VERDICT
from kr_fast.recycling import given, precision, preflight, stage_progress, tracking
from kr_fast.recycling.budget.ledger import NAME, Ledger
from kr_fast.recycling.commands import DISTIL, GENERATOR, of_command
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import ledger as dp_ledger
from kr_fast.recycling.stages import auditing, canaries, dataset, duplicates, given_teacher, reporting, shadows, teacher
from kr_fast.recycling.stages.distillation import ablation, gkd, shadow_students, student
from kr_fast.recycling.stages.generation import checkpoints, few_step, generator_rounds, tuning
from kr_fast.runtime import state
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import return_freed_memory
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import Journal, refuse
from kr_fast.runtime.storage.layout import Folder

# (name, function, runs on every rank)
Stage = tuple[str, Callable[[Context], dict], bool]
STAGES: tuple[Stage, ...] = (
    ("data", dataset.run, False),
    ("privacy", dp_ledger.run, False),
    ("teacher", teacher.run, False),
    ("generator", generator_rounds.run, True),
    ("checkpoints", checkpoints.run, False),
    ("tuning", tuning.run, False),
    ("few_step", few_step.run, False),
    ("gkd", gkd.run, False),
    ("student", student.run, False),
    ("ablation", ablation.run, False),
    ("shadows", shadows.run, True),
    ("canaries", canaries.run_teachers, True),
    ("canary_students", canaries.run_students, True),
    ("shadow_students", shadow_students.run, True),
    ("audit", auditing.run, False),
    ("report", reporting.run, False),
)
# Stage -> its files and folders, whose SHA-256 the journal holds.
FILES: dict[str, Callable[[Context], list[Path]]] = {
    "teacher": lambda context: [context.folder.teacher],
    "generator": lambda context: [context.folder.generators],
    "few_step": lambda context: [context.folder.few_step],
    "gkd": gkd.left,
    "ablation": lambda context: [context.folder.ablation],
    "shadows": lambda context: [context.folder.shadows],
    "canaries": lambda context: [context.folder.twin_teachers, context.folder.canaries / "canaries.json"],
    "canary_students": lambda context: [context.folder.twin_students],
    "shadow_students": lambda context: [context.folder.shadow_students, context.folder.ablation_students],
    "audit": auditing.left,
    "report": reporting.left,
}
REPEATABLE = ("audit", "report")  # stages that are quick to repeat where a file of theirs was changed
IN_MEMORY = "images in memory"  # the option data of a run on such
# Options that may change: files are identified by their SHA-256, a budget may grow, a verdict is made of the figures.
MOVABLE = ("data", "table", "budget", "log_with", *OF_VERDICT)
# Stages that go on, or are made again, with a larger budget. Shadow and twin Teachers stay.
EXTENDED = ("generator", "checkpoints", "tuning", "gkd", "student", "canary_students", "shadow_students")
EXTENDED += ("audit", "report")


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """The figures of ``metrics.json``, the folder of the run and the path of the report."""

    metrics: dict[str, Any]
    out: Path
    report: Path

    def __repr__(self) -> str:
        accuracy = ", ".join(f"{name} {self.metrics[name]['test_accuracy']:.4f}" for name in ("teacher", "student"))
        return f"Result(test accuracy: {accuracy}; report: {self.report})"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict and the first table of the report."""
        from kr_fast.report import render, run_audit
        from kr_fast.report.sections import verdict

        lines = verdict.lines(self.metrics["verdict"], self.metrics.get("guarantee"))
        blocks = [("note", lines), ("table", run_audit.headline(self.metrics))]
        blocks.append(("text", run_audit.verdict(self.metrics)))
        return render.fragment([*blocks, ("text", f"Report: {self.report}")])


def recycle(config: RecycleConfig, *, source: Source | None = None, data: Any = None) -> Result:
    """Run Knowledge Recycling, or continue the run in ``config.out``.

    Args:
        source: what :func:`kr_fast.data.read` returned of ``config.data``, where several runs share it; None reads it.
        data: in place of ``config.data``, images in memory: a pair (images, labels) of arrays, a map-style data set of
            such pairs, or a dictionary of them by split, as :func:`kr_fast.data.load` takes them. The run continues
            when it is called with the same ones.
    Returns: the metrics and the path of the report; see docs/method/index.md for the stages.
    Raises: UserError for bad input, before anything is written; FileNotFoundError for missing data.
    Source: Lomurno and Matteucci, "Synthetic Image Learning: Preserving Performance and Preventing Membership
        Inference Attacks", Pattern Recognition Letters 190, 2025.
    """
    if config.command not in ("run", DISTIL.name):
        fail("run", "config", "be that of kr-fast run", f"one of kr-fast {config.command}")
    context = _carried_out(config, source, data)
    return Result(files.read_json(context.folder.metrics), context.out, reporting.pages(context) / "report.html")


@dataclasses.dataclass(frozen=True)
class Generator:
    """The folder of a generator that was trained by itself, and what the stage recorded.

    ``checkpoint``: the folder of its last checkpoint in diffusers' format; ``memorisation``: as in ``metrics.json``.
    """

    out: Path
    checkpoint: Path
    parameters: int
    images_per_second: float | None
    loss: float | None
    memorisation: dict[str, Any]


def train_generator(config: RecycleConfig, *, source: Source | None = None, data: Any = None) -> Generator:
    """Train a class-conditional generator by itself, or continue the training in ``config.out``.

    ``config.out`` is what ``kr-fast synthesize --model`` and ``generator`` of a run take. There is no Teacher to choose
    among checkpoints by: they take the last one.

    Args:
        config: whose options of Teacher, Student, tuning and audit have no effect (a line on the logger names them).
        source, data: as of :func:`recycle`.
    Raises: as :func:`recycle`.
    """
    context = _carried_out(GENERATOR.of(config), source, data)
    trained = context.result("generator")
    checkpoint, losses = context.folder.generator(trained["checkpoints"][-1]), trained["curves"]["loss"]
    facts = {name: trained[name] for name in ("parameters", "images_per_second", "memorisation")}
    return Generator(context.out, checkpoint, loss=losses[-1] if losses else None, **facts)


def distil(config: RecycleConfig, *, source: Source | None = None, data: Any = None) -> Result:
    """Distil a Student from the Teacher and the generator that ``config`` names, or continue that in ``config.out``.

    A run without an audit that trains neither of them. The data are needed to choose by (validation images) and for
    the figures at the end (test images).

    Args:
        config: with ``teacher`` and ``generator``; options of other stages have no effect (a line on the logger names
            them).
        source, data: as of :func:`recycle`.
    Raises: as :func:`recycle`.
    """
    return recycle(distil_config(config), source=source, data=data)


def distil_config(config: RecycleConfig) -> RecycleConfig:
    """The configuration as :func:`distil` carries it out. Raises: UserError without a Teacher or a generator."""
    kinds = {"teacher": given_teacher.NAMES, "generator": "a folder, a file of images or pkg.mod:function"}
    for name, kind in kinds.items():
        if not getattr(config, name):
            fail(DISTIL.name, name, f"be given: {kind}", "none")
    return DISTIL.of(config)


def _carried_out(config: RecycleConfig, source: Source | None, data: Any) -> Context:
    """All stages of ``config``, finished."""
    start = time.perf_counter()
    if data is not None:
        config, source = of_memory(config, data)
    context = load_context(config, source, mapped=Folder(config.out).mapped_images)
    out, runtime = context.out, context.runtime
    try:
        with runtime.main_first() as main:
            if main:
                larger = preflight.larger(context)
                context.notes = preflight.check(context) if larger or _unfinished(context) else []
                manifest.open_run(out, config.record(), "run", MOVABLE)
                context.journal.reload()
                if context.ledger is not None:
                    _open_ledger(context.ledger, context.journal, larger)
                check_files(context, REPEATABLE)
                if (done := context.journal.done("report")) and done.get("limits") != reporting.limits(context):
                    context.journal.forget("report")  # its verdict is by other limits
                for note in context.notes:
                    logger.warning("run: %s", note)
        context.journal.reload()
        context.precision = precision.of_run(context)
        logger.info("run: trains in %s", context.precision)
        if config.budget and context.ledger is None:  # on other ranks, and where nothing but the report is left to do
            context.ledger = Ledger.read(context.folder.state / NAME)
        if context.ledger is not None:
            context.ledger.since = start
        progress = stage_progress.of_run(context, [name for name, _, _ in stages_of(config)])
        with tracking.tracked(config.log_with if runtime.is_main else (), context.folder.logs, config.record()) as told:
            for stage in stages_of(config):
                _stage(context, stage, start, progress, told)
                start = time.perf_counter()
        return context
    finally:
        manifest.release()


def of_memory(config: RecycleConfig, data: Any) -> tuple[RecycleConfig, Source]:
    """The configuration of a run on images in memory, which says so, and the source of its images."""
    if config.data not in (RecycleConfig.data, IN_MEMORY):
        fail("run", "data", "be left out of the configuration of a run on images in memory", config.data)
    begun = dataclasses.replace(config, data=IN_MEMORY)
    return begun, read(data, options=config.reading)


def dry_run(config: RecycleConfig) -> str:
    """The plan of a run, after all checks of :func:`recycle`: configuration, data, networks, time, memory and disk.

    Nothing is left on the disk: images of a large set are decoded to files beside the run, which are removed.
    Returns: a YAML file with the configuration, and the rest as comments.
    Raises: as :func:`recycle`, but for a folder in use.
    """
    with files.scratch_folder(Folder(config.out).mapped_images) as own:  # not that of another dry run at the same time
        context = load_context(config, mapped=state.current().broadcast(own))
        notes = preflight.check(context)
        context.precision = precision.of_run(context)
        text = preflight.describe(context, notes)
        context.runtime.barrier()  # other processes map the files too
        return text


def load_context(config: RecycleConfig, source: Source | None = None, *, mapped: Path | None = None) -> Context:
    """The run that ``config`` describes, checked against what is in its folder.

    ``mapped``: the folder that images of a large set are decoded to; None for memory.
    """
    manifest.refuse_inside(config.out, config.data, "run")
    out = Path(config.out)
    begun, journal = (
        manifest.check_run(out, config.record(), "run", MOVABLE),
        Journal(out),
    )  # before the data are read, which takes long
    source = read(config.data, options=config.reading) if source is None else source
    fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    loaded = source.dataset(seed=config.seed, **fractions, folder=mapped)
    device = state.current().device
    config = given.applied(given_teacher.applied(config), loaded, device)
    context = Context(config, out, state.current(), loaded, journal)
    duplicates.apply(context, source.given_splits)
    if begun:
        dataset.check(context)
        if bool(before := manifest.read_config(context.folder.config)["budget"]) != bool(config.budget):
            rule = f"equal {before!r} of the run in {out}"
            fail("run", "budget", rule, f"{config.budget!r}; choose another --out to start a new run")
    return context


def _open_ledger(ledger: Ledger, journal: Journal, larger: float | None) -> None:
    """Write the ledger down; with a ``larger`` budget the stages that it extends are unfinished again."""
    if larger is None:
        ledger.save()
        return
    again = [stage for stage in EXTENDED if journal.done(stage) is not None]
    for stage in again:
        journal.forget(stage)
    ledger.reopen(again, larger)


def _unfinished(context: Context) -> bool:
    return any(context.journal.done(name) is None for name, _, _ in stages_of(context.config))


def stages_of(config: RecycleConfig) -> list[Stage]:
    """The stages of a command, in order: privacy, few-step generator, canaries and ablation where it has them."""
    absent = () if config.audit_canaries else ("canaries", "canary_students")
    absent += () if config.ablation else ("ablation",)
    absent += () if config.few_steps else ("few_step",)
    absent += () if config.epsilon else ("privacy",)
    own = of_command(config, {stage[0]: stage for stage in STAGES if stage[0] not in absent})
    return [
        (name, run, everywhere or (name == "teacher" and bool(config.epsilon)))
        for name, run, everywhere in own.values()
    ]


def check_files(context: Context, repeatable: tuple[str, ...] = ()) -> None:
    """Refuse changed files of finished stages; the stages ``repeatable`` are marked as unfinished instead."""
    journal = context.journal
    for stage in list(journal.seconds()):
        changed = list(journal.changed(stage))
        for path, got in changed:
            if stage not in repeatable or path == context.folder.control:
                refuse(journal, stage, "run", path, got)
            logger.warning("run: %s is not as the stage %s left it (got %s): it is made again", path, stage, got)
        if changed:
            journal.forget(stage)


def _stage(
    context: Context,
    stage: Stage,
    start: float,
    progress: stage_progress.StageProgress,
    told: tracking.Trackers,
) -> None:
    """Run ``stage``, record it and tell the trackers, unless it was done; its seconds are counted from ``start``."""
    name, run, everywhere = stage
    runtime = context.runtime
    if runtime.broadcast(context.journal.done(name) is not None):
        context.journal.reload()
        return
    progress.begin(name, context.journal.seconds())
    if everywhere:
        with runtime.main_first() as main:
            if main:
                check_files(context)
        result = run(context)
    with runtime.main_first() as main:
        if main:
            if not everywhere:
                check_files(context)
                result = run(context)
            left = FILES[name](context) if name in FILES else []
            seconds = time.perf_counter() - start if context.ledger is None else context.ledger.finish(name)
            context.journal.finish(name, seconds, result, left)
            told.stage(name, seconds, result)
            if name == "report":
                told.metrics(context.folder.metrics)
    gc.collect()  # networks refer to themselves
    return_freed_memory()
    runtime.barrier()
    context.journal.reload()
