"""Twins with mislabelled canaries, which prove an audit's power: see :mod:`kr_fast.membership.attacks.canaries`.

- Twin Teacher ``k`` is trained as the Teacher was, on all training images, its epoch chosen on validation. Canaries
  have a wrong label there; by a coin each is among its training images or left out.
- Twin Student ``k`` learns from twin Teacher ``k`` as the Student did from the Teacher, from the very sets that the
  Student saw. Their generator never saw a wrong label: what is measured is the path through the soft labels.

Teacher, Student and shadows never see a wrong label, and no twin is a shadow of anything but twins. Twins are shared
out over the ranks, and on a CPU over processes of one thread each.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from kr_fast.ensemble import fit, load_shadows
from kr_fast.ensemble.training.workers import Trains
from kr_fast.membership.attacks.canaries import Canaries, attack_canaries, draw_canaries, power
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import shadows, teacher
from kr_fast.recycling.stages.distillation import gkd, shadow_students
from kr_fast.recycling.stages.generation.sampling import student_sampling
from kr_fast.report.run_audit import FULL, TEACHER
from kr_fast.runtime import seeds
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

ATTACK = "lira"


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The training of twin Teachers, as worker processes receive it."""

    context: Context

    def train(self, index: int, device: torch.device) -> None:
        """Train twin Teacher ``index``, and save it."""
        context, c, canaries = self.context, self.context.config, drawn(self.context)
        train = context.data.train
        inside, labels = torch.ones(len(train), dtype=torch.bool), train.labels.clone()
        inside[canaries.index], labels[canaries.index] = canaries.keep[index], canaries.labels
        model = context.seeded(c.teacher_arch, c.teacher_width, "twin teacher", index)
        fit(
            model,
            dataclasses.replace(train, labels=labels).rows(inside),
            teacher.recipe(context),
            seed=seeds.derive(c.seed, "twin teacher", index),
            val=context.data.val,
            state_path=context.folder.state / f"twin-teacher-{index:03d}.pt",
            choose=c.teacher_choose,
            precision=context.precision.classifiers,
        )
        files.save_tensors(shadows.file(context.folder.twin_teachers, index), model.state_dict())


@dataclasses.dataclass(frozen=True)
class Students:
    """The training of twin Students, as worker processes receive it."""

    context: Context

    def train(self, index: int, device: torch.device) -> None:
        """Train twin Student ``index``, and save it."""
        context, c = self.context, self.context.config
        sampling = student_sampling(context)
        student = context.seeded(c.student_arch, c.student_width, "twin student", index)
        gkd.distil(
            context,
            shadows.load_one(context, context.folder.twin_teachers, index),
            student,
            gkd.shared_draw(context, sampling),
            gkd.student_schedule(context),
            confidence=sampling.confidence,
            seed=seeds.derive(c.seed, "twin student", index),
            state_path=context.folder.state / f"twin-student-{index:03d}.pt",
        )
        files.save_tensors(shadows.file(context.folder.twin_students, index), student.state_dict())


def drawn(context: Context) -> Canaries:
    """The canaries of the run, and the twins that each is in."""
    c, data = context.config, context.data
    seed = seeds.derive(c.seed, "canaries")
    options = {"models": c.num_shadows, "classes": data.num_classes, "seed": seed, "groups": data.train.groups}
    return draw_canaries(data.train.labels, c.audit_canaries, **options)


def run_teachers(context: Context) -> dict[str, Any]:
    """Train what is missing of the twin Teachers, on every rank."""
    c = context.config
    _train(context, Teachers(context), context.folder.twin_teachers, c.num_shadows, "twin teachers")
    if context.runtime.is_main:
        canaries = drawn(context)
        record = {"index": canaries.index.tolist(), "labels": canaries.labels.tolist()}
        files.write_json(context.folder.canaries / "canaries.json", record)
        files.save_array(context.folder.twin_teachers / "keep.npy", canaries.keep.numpy())
    return {"models": c.num_shadows, "count": c.audit_canaries}


def run_students(context: Context) -> dict[str, Any]:
    """Train what is missing of the twin Students, on every rank."""
    c, runtime, folder = context.config, context.runtime, context.folder.twin_students
    if c.num_students:
        with runtime.main_first() as main:
            if main:
                gkd.discard_outdated(context, folder, "canaries", "twin-student-*.pt")
        if runtime.broadcast(len(list(folder.glob("model-*.safetensors"))) < c.num_students):
            shadow_students.complete(context, gkd.shared_sets(context, student_sampling(context)))
        _train(context, Students(context), folder, c.num_students, "twin students")
        if runtime.is_main:
            files.save_array(folder / "keep.npy", drawn(context).keep[: c.num_students].numpy())
            if context.journal.done("shadow_students") is not None:  # which else uses the sets, and removes them
                shutil.rmtree(context.folder.shared, ignore_errors=True)
    return {"models": c.num_students}


def _train(context: Context, job: Trains, folder: Path, count: int, words: str) -> None:
    mine = shadows.missing(context, folder, count)
    shadows.train_missing(context, job, mine, len(context.runtime.shard(count)), words)


def attack(context: Context, audit: dict[str, Any]) -> dict[str, Any]:
    """LiRA on the canaries of the twins, beside what it finds of ordinary records in Teacher and Student.

    Args:
        audit: the figures of the run's audit, target by target.
    Returns: {"count", "level", "teacher": {figures of :func:`attack_canaries`, "own": {"auc", "auc_ci"}}, "student":
        likewise or None, "power": whether the Teacher's interval on canaries lies above that of its own members}.
    """
    c, level = context.config, audit["setting"]["level"]
    canaries, seed = drawn(context), seeds.derive(c.seed, "attack on canaries")
    images = context.data.train.images[canaries.index].cpu()
    found: dict[str, Any] = {"count": c.audit_canaries, "level": level, "teacher": None, "student": None}
    made = {"teacher": (TEACHER, c.num_shadows, context.folder.twin_teachers, (c.teacher_arch, c.teacher_width))}
    made["student"] = (FULL, c.num_students, context.folder.twin_students, (c.student_arch, c.student_width))
    for name, (target, count, folder, network) in made.items():
        if not count:
            continue
        twins = load_shadows(context.make_network(*network), folder, device=context.runtime.device)
        options = {"augment": c.audit_augment, "want": ("phi",), "description": f"canaries of the {name}"}
        phi = twins.array.signals(images, canaries.labels, **options)["phi"]
        own = {key: audit[target][ATTACK][key] for key in ("auc", "auc_ci")}
        found[name] = {**attack_canaries(phi, twins.keep, level=level, seed=seed), "own": own}
    return {**found, "power": power(found["teacher"], found["teacher"]["own"]["auc_ci"])}


def warnings_of(found: dict[str, Any]) -> list[str]:
    """What makes an audit weak whose canaries are not found, as a clause; it is logged."""
    if found["power"]:
        return []
    words = (
        f"LiRA on mislabelled canaries (AUC {found['teacher']['auc']:.3f}) is not seen above LiRA on the Teacher's own "
        f"members ({found['teacher']['own']['auc']:.3f}): no proof that this audit has power"
    )
    logger.warning("audit: %s", words)
    return [words]
