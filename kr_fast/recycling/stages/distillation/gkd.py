"""Generative Knowledge Distillation: a Student learns the Teacher's soft labels on images that are regenerated.

Every period has fresh image ids, so no synthetic image is seen in two periods. The Teacher is evaluated on the same
augmented batch as the Student. Runs on rank 0.
"""

import copy
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data import Split
from kr_fast.ensemble.training.evaluation import scores
from kr_fast.recycling import given
from kr_fast.recycling.budget.ledger import Ledger
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.drawing import Draw, Drawing, KeptSets, ahead, fixed
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import nearest_images
from kr_fast.recycling.stages.distillation.student_training import Schedule, StudentTraining, confident
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.sampling import (
    Sampling,
    default_sampling,
    network_calls,
    student_sampling,
    tuned_sampling,
)
from kr_fast.recycling.throughput import SynthesisClock
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.log import logger
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.synthesis import Sampler
from kr_fast.synthesis.optimized.optimize import optimize
from kr_fast.training.fused import fused


@dataclasses.dataclass
class Distilled:
    """A trained Student's curves by period, and its last synthetic set; ``confident``: share of images that count.

    ``val_score``: what the best period was chosen by, the accuracy or the option ``student_choose``; ``rate``: images a
    second that the Student was trained on since the last start, None if it was finished then.
    """

    loss: list[float]
    val_accuracy: list[float]
    val_score: list[float]
    confident: list[float]
    best_period: int
    ids: Tensor
    labels: Tensor
    images: Tensor
    rate: float | None = None


def drawing(
    context: Context,
    sampling: Sampling,
    images: int,
    *,
    checkpoint: Path | None = None,
    real: Tensor | None = None,
    seed: int | None = None,
    kept: KeptSets | None = None,
    seen: Callable[[int, Tensor], None] | None = None,
    clock: SynthesisClock | None = None,
) -> Drawing:
    """Draw ``images`` per period with ``sampling``; an id addresses one image of (generator, seed) and is used once.

    Args:
        checkpoint: folder of the generator; None for this run's that ``sampling`` names.
        real: labels that the generator was trained on; None for those of the training split. Classes are as frequent
            as in them, unless ``label_plan`` is balanced.
        seed: of the images; None for this run's.
        kept: where sets are written, and read from if they are there.
        seen: called with each period and its images.
        clock: times the drawing.
    """
    c, plan = context.config, context.label_plan(real)
    own = sampling.folder(context) if checkpoint is None else checkpoint
    network, _, objective = generator.load(own, context.runtime.device)
    optimize(network)
    sampler = Sampler(
        network,
        sampling.scheduler(objective),
        sampling.num_inference_steps,
        seed=seeds.derive(c.seed if seed is None else seed, "sampling"),
        guidance_scale=sampling.guidance_scale,
        num_classes=context.data.num_classes,
        guidance_interval=sampling.guidance_interval,
        noise_scale=sampling.noise_scale,
        micro_batch=c.micro_batch,
        crop=context.data.image_shape[:2],
    )
    return Drawing(sampler, plan, images, kept, seen, clock or SynthesisClock())


def drawn(
    context: Context,
    sampling: Sampling,
    images: int,
    *,
    seed: int | None = None,
    kept: KeptSets | None = None,
    clock: SynthesisClock | None = None,
    **options: Any,
) -> Draw:
    """As :func:`drawing`, for a Student: from the generator that was given, where one was (without other options).

    With ``fixed_images`` every period has the images of the first.
    """
    c = context.config
    if c.generator:
        source = given.opened(c, context.data, context.runtime.device)
        draw = source.draw(sampling, context.label_plan(), images, c.seed if seed is None else seed, kept)
        if clock is not None and isinstance(draw, Drawing):
            draw = dataclasses.replace(draw, clock=clock)
    else:
        draw = drawing(context, sampling, images, seed=seed, kept=kept, clock=clock, **options)
    return fixed(draw) if c.fixed_images else draw


def shared_sets(context: Context, sampling: Sampling) -> KeptSets | None:
    """Where the Student's sets are kept for shadow and twin Students that learn from the same ones; None if none do."""
    if not context.config.keeps_sets:
        return None
    made_from = {"made_from": context.journal.digest("generator", "few_step"), **sampling.values()}
    return KeptSets(context.folder.shared, made_from, context.runtime.device)


def discard_outdated(context: Context, folder: Path, teachers: str, unfinished: str) -> None:
    """Delete Students in ``folder`` that were made from other files, or other ``teachers``, than those of this run.

    Args:
        unfinished: pattern of the files in ``state/`` from which their trainings would continue.
    """
    sampling = student_sampling(context).values()
    record = {"made_from": context.journal.digest("generator", "few_step", teachers), **sampling}
    if context.ledger is not None:  # without a budget its length is that of the configuration
        record["cycles"] = list(student_schedule(context).cycles)
    path = folder / "made_from.json"
    if path.exists() and files.read_json(path) != record:
        names = ("model-*.safetensors", "generator-*", "few-step-*", "denoising-*.npy", "nearest-*.npy")
        outdated = [path for name in names for path in folder.glob(name)]
        for left in (*outdated, *context.folder.state.glob(unfinished)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    files.write_json(path, record)


def shared_draw(context: Context, sampling: Sampling) -> Draw:
    """The Student's sets, which its training or :func:`shadow_students.complete` has left."""
    load = shared_sets(context, sampling).load
    return fixed(load) if context.config.fixed_images else load


def distil(
    context: Context,
    teacher_model: nn.Module,
    student: nn.Module,
    draw: Draw,
    schedule: Schedule,
    *,
    confidence: float,
    seed: int,
    description: str | None = None,
    state_path: Path | None = None,
    keep_state: bool = False,
) -> Distilled:
    """Train ``student`` in place; its weights at the end are those of the period best on real validation images, or of
    the last period where the run is differentially private.

    Args:
        teacher_model: frozen and in eval mode.
        draw: gives the synthetic set of each period.
        confidence: least probability that the Teacher gives an image's label; images below it have weight 0.
        seed: of shuffles and augmentation.
        state_path: file to continue from, saved every period; removed at the end unless ``keep_state``, with which
            a schedule of further cycles continues from it.
    """
    device = context.runtime.device
    empty = torch.empty(0, dtype=torch.int64)
    done = Distilled([], [], [], [], 0, empty, empty, empty)
    best, first = None, 0
    with fused(teacher_model), fused(student):
        training = StudentTraining(context, teacher_model, student, schedule, seed)
        with files.continuing(state_path) as state:
            if state is not None:
                training.load_state(state)
                best, first = state["best"], state["period"]
                done.loss, done.val_accuracy, done.confident = state["loss"], state["val_accuracy"], state["kept"]
                done.val_score, done.best_period = state["val_score"], state["best_period"]
        with (
            bar(schedule.periods, description, "period", first) as progress,
            ahead(draw, range(first, schedule.periods)) as sets,
        ):
            if first == schedule.periods:  # a whole training that was killed before its results were written
                done.ids, done.labels, done.images = draw(first - 1)
            for period, (ids, labels, images) in enumerate(sets, first):
                weight = confident(teacher_model, images, labels.to(device), confidence)
                done.confident.append(float(weight.float().mean()))
                if done.confident[-1] == 0:
                    logger.warning("no image of period %d reaches the Teacher confidence %g", period, confidence)
                done.ids, done.labels, done.images = ids, labels, images
                done.loss.append(training.period(period, Split(images, labels.to(device)), weight))
                if not done.loss[-1] < float("inf"):
                    raise UserError(f"run: distillation loss must be finite, got {done.loss[-1]} in period {period}")
                of_val = scores(student, context.data.val, context.config.student_choose)
                done.val_accuracy.append(of_val.accuracy)
                done.val_score.append(of_val.value)
                better = best is None or of_val.value >= done.val_score[done.best_period]
                if better or context.config.epsilon:  # which lets no choice read private images
                    done.best_period, best = period, copy.deepcopy(student.state_dict())
                progress.update()
                progress.set(loss=done.loss[-1], val=done.val_accuracy[-1])
                if state_path and (keep_state or period + 1 < schedule.periods):
                    curves = {"loss": done.loss, "val_accuracy": done.val_accuracy, "kept": done.confident}
                    curves["val_score"] = done.val_score
                    position = {"best_period": done.best_period, "best": best, "period": period + 1}
                    files.save_state(state_path, {**training.state(), **curves, **position})
    student.load_state_dict(best)
    student.eval()
    done.rate = training.images / training.seconds if training.seconds else None
    if state_path and not keep_state:
        state_path.unlink(missing_ok=True)
    return done


def trial(context: Context, teacher_model: nn.Module, sampling: Sampling, length: int = 1, repeat: int = 0) -> float:
    """Best score on validation (option ``student_choose``) of a short Student with ``sampling``.

    It is the criterion of checkpoint choice and tuning.

    Args:
        length: times ``trial_periods``, in one cycle of the rate.
        repeat: other weights, shuffles and images for each.
    """
    c, ledger = context.config, context.ledger
    names = ("trial", repeat) if repeat else ("trial",)
    student, seed = context.seeded(c.student_arch, c.student_width, *names), seeds.derive(c.seed, *names)
    draw_seed = seeds.derive(c.seed, *names, "images") if repeat else None
    if ledger is None:
        schedule = trial_schedule(c, sampling, length)
    else:
        schedule = Schedule((length,), ledger.trial_images, ledger.passes)
    draw = drawn(context, sampling, schedule.images, seed=draw_seed)
    done = distil(context, teacher_model, student, draw, schedule, confidence=sampling.confidence, seed=seed)
    return done.val_score[done.best_period]


def trial_schedule(c: RecycleConfig, sampling: Sampling, length: int = 1) -> Schedule:
    """How long a short Student trains: sets as large, and as many passes over them, beside the Student's as usual."""
    whole = Schedule((length * c.trial_periods,), c.trial_images, c.trial_epochs)
    images, passes = c.trial_images * sampling.images / c.images, c.trial_epochs * sampling.passes / c.student_epochs
    return whole.resized(*(each and max(round(each), 1) for each in (images, passes)), c.student_batch_size)


def most_drawn(c: RecycleConfig) -> int:
    """Images of all of the Student's periods, with that size of a set and those passes over it that need most."""
    whole = Schedule((c.periods,), c.images, c.student_epochs)
    pairs = itertools.product((0, *c.tune_images), (0, *c.tune_student_epochs))
    schedules = [whole.resized(*pair, c.student_batch_size) for pair in pairs]
    return max(each.periods * each.images for each in schedules)


def left(context: Context) -> list[Path]:
    """The files of the Student and of its last set."""
    folder = context.folder
    paths = [folder.student, folder.images, folder.labels, folder.ids]
    return [*paths, folder.nearest] if folder.nearest.exists() else paths


def run(context: Context) -> dict[str, Any]:
    """Train and save the Student, with the chosen sampling."""
    c = context.config
    teacher_model = teacher.load(context)
    sampling = student_sampling(context)
    student = context.seeded(c.student_arch, c.student_width, "student")
    if (kept := shared_sets(context, sampling)) is not None:
        kept.discard_outdated()
    schedule = student_schedule(context) if context.ledger is None else None
    seen, clock = nearest_images.keeping(context, context.folder.nearest), SynthesisClock()
    count = c.images if schedule is None else schedule.images
    train = functools.partial(
        distil,
        context,
        teacher_model,
        student,
        drawn(context, sampling, count, kept=kept, seen=seen, clock=clock),
        confidence=sampling.confidence,
        seed=seeds.derive(c.seed, "student"),
        description="student",
        state_path=context.folder.state / "student.pt",
    )
    if schedule is not None:
        done = train(schedule)
    else:
        schedule, done = _in_cycles(context, context.ledger, sampling, train)
    files.save_tensors(context.folder.student, student.state_dict(), teacher.metadata(context, c.student_arch))
    folder = context.folder
    for path, values in ((folder.images, done.images), (folder.labels, done.labels), (folder.ids, done.ids)):
        files.save_array(path, values.cpu().numpy())
    return {
        "val_accuracy": done.val_accuracy[done.best_period],
        "best_period": done.best_period + 1,
        "kept": done.confident,
        "parameters": sum(p.numel() for p in student.parameters()),
        "throughput": {"distillation": done.rate, **clock.figures()},
        "curves": {
            "period": list(range(1, schedule.periods + 1)),
            "loss": done.loss,
            "val_accuracy": done.val_accuracy,
            **({} if c.student_choose == "accuracy" else {f"val_{c.student_choose}": done.val_score}),
        },
        **({} if context.ledger is None else {"schedule": dataclasses.asdict(schedule)}),
    }


def _in_cycles(
    context: Context, ledger: Ledger, sampling: Sampling, train: Callable[..., Distilled]
) -> tuple[Schedule, Distilled]:
    """Train a Student for as long as its ledger has a next cycle."""
    c, before = context.config, default_sampling(context, sampling.checkpoint)
    cost = network_calls(sampling) / network_calls(before)
    ledger.begin_student(sampling.values(), context.folder.state / "student.pt", cost)
    ledger.spend("gkd")
    done = None
    while cycles := ledger.next_cycle():
        schedule = Schedule(tuple(cycles), c.images, ledger.student["passes"])
        done = train(schedule, keep_state=True)
        ledger.finish_cycle(ledger.spend("gkd"), max(done.val_accuracy[-cycles[-1] :]))
    if done is None:  # it was killed after its last cycle
        schedule = Schedule(tuple(each["periods"] for each in ledger.cycles), c.images, ledger.student["passes"])
        done = train(schedule, keep_state=True)
    return schedule, done


def student_schedule(context: Context) -> Schedule:
    """How long the Student was trained, and every shadow of it is."""
    c = context.config
    if context.ledger is None:
        sampling = tuned_sampling(context)
        whole = Schedule((c.periods,), c.images, c.student_epochs)
        return whole.resized(sampling.images, sampling.passes, c.student_batch_size)
    values = context.result("gkd")["schedule"]
    return Schedule(tuple(values["cycles"]), values["images"], values["epochs"])


def load(context: Context, path: Path | None = None) -> nn.Module:
    """The finished Student, or one whose weights are in ``path``, in eval mode."""
    model = context.network(context.config.student_arch, context.config.student_width)
    model.load_state_dict(files.load_tensors(path or context.folder.student))
    return model.to(context.runtime.device).eval()
