"""The audit: Teacher, Student and the released images are attacked, and a positive control. Runs on rank 0.

- ``teacher``: with shadow Teachers, which were made as it was.
- ``student``: with the same shadow Teachers (transfer: a lower bound).
- ``student_full``: the Student with shadow Students, see :mod:`kr_fast.recycling.stages.distillation.shadow_students`.
- ``released``: the synthetic images of the last period, which the run leaves in ``synthetic/``, by themselves.
- ``released_calibrated``: the images of all periods, and the released ones, by those of shadow pipelines with
  generators of their own, see :mod:`kr_fast.recycling.stages.distillation.nearest_images`.
- ``generator``: the generator's weights, see :mod:`kr_fast.recycling.stages.generation.generator_attack`.
- ``control``: an overfitted model of the Teacher's architecture, which the attacks have to detect.

A Teacher that was given (the option ``teacher``) was not made by this package's recipe, as all shadows were, and one
that was trained with differential privacy not as they were: it and ``student_full`` are "transfer" then.

Validation images, on which no model was trained, are the population and the reference of attacks that want
further non-members; those that occur among the images under attack are left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership import Auxiliary, Choices, Target, audit
from kr_fast.membership.audit.files import write_private
from kr_fast.membership.audit.record_table import unnamed
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import canaries, control, dataset, shadows, teacher
from kr_fast.recycling.stages.distillation import ablation, gkd, nearest_images, shadow_students
from kr_fast.recycling.stages.distillation import student as student_stage
from kr_fast.recycling.stages.generation import generator_attack
from kr_fast.report.run_audit import FULL, RELEASED, TEACHER, TRANSFER
from kr_fast.report.sentences import OF_RUN
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import Images, rows_of

GIVEN = "the generator that was given and its images"
SHARES = {"shared": "the generator (trained on all members) and its images", "retrained": "the tuned sampling"}


def left(context: Context) -> list[Path]:
    """The files of the audit: scores and the positive control. Its pages hold the verdict and are of the report."""
    folder = context.folder
    control = (folder.control, folder.control.with_suffix(".json"))
    private = (folder.denoising, folder.exposed, folder.records, folder.group_risks, folder.closest_pairs)
    return [folder.audit_arrays, *control, *private]


def run(context: Context) -> dict[str, Any]:
    """The audit, unless it was turned off, and the accuracy over privacy (AOP) that follows from it."""
    c = context.config
    if c.num_shadows == 0:
        return {"audit": None, "aop": None}
    images, labels, members = shadows.pool(context)
    tested, student = context.result("student")["test_accuracy"], gkd.load(context)
    unlike = bool(c.teacher or c.epsilon)  # no shadow is made as the Teacher was
    kind, of_student = "transfer" if unlike else None, tested["student"]
    sets = {TEACHER: shadows.load(context)}
    known = {} if unlike else {"recipe": teacher.made_by(context)}
    options = {"accuracy": tested["teacher"], "title": OF_RUN[TEACHER], **known}
    targets = {TEACHER: Target(teacher.load(context), kind, **options)}
    targets[TRANSFER] = Target(student, kind, accuracy=of_student, title=OF_RUN[TRANSFER])
    if c.num_students:
        sets[FULL] = shadow_students.load(context)
        made_by = student_stage.recipe(context)
        targets[FULL] = Target(
            student, kind, GIVEN if c.generator else SHARES[c.audit_generator], of_student, OF_RUN[FULL], made_by
        )
    model, released, further = None, {}, dataset.population(context)
    if c.audit_control:
        model = control.train(context, context.runtime.device, "positive control")
    if c.audit_released:
        released[RELEASED] = torch.from_numpy(np.load(context.folder.images, mmap_mode="c"))
    auxiliary = Auxiliary((further.images.cpu(), further.labels.cpu()) if len(further) else None, released)
    options = {"augment": c.audit_augment, "leave_out_duplicates": c.leave_out_duplicates}
    options |= {"delta": c.delta} if c.epsilon else {}  # so that the bounds of epsilon stand beside the ledger's
    choices = Choices(**options, seed=seeds.derive(c.seed, "audit"))
    options = {"control": model, "auxiliary": auxiliary, "choices": choices, "groups": shadows.groups(context)}
    report = audit(targets, sets, images, labels, members, **options)
    report = dataclasses.replace(report, records=unnamed(report.records))
    if c.audit_canaries:
        found = canaries.attack(context, report.to_dict())
        warnings = (*report.warnings, *canaries.warnings_of(found))
        setting, parts = {**report.setting, "warnings": list(warnings)}, {**report.parts, "canaries": found}
        report = dataclasses.replace(report, setting=setting, warnings=warnings, parts=parts)
    if c.attacks_generator:
        figures, arrays = generator_attack.run(context, report.data.index)
        report = dataclasses.replace(report, parts={**report.parts, "generator": figures})
        files.save_arrays(context.folder.denoising, arrays)
    if c.retrains_generators and (calibrated := nearest_images.run(context, report.data.index)) is not None:
        report = dataclasses.replace(report, parts={**report.parts, "released_calibrated": calibrated})
    results = report.to_dict()
    del results["verdict"]  # on all targets: that on the Student is of the report
    name_classes(results["records"], context.data.class_names)
    if c.audit_page:
        write_private(report, context.folder)
    else:
        files.save_arrays(context.folder.audit_arrays, report.arrays())
    rest = {}
    if c.ablation and c.num_students:
        auxiliary = dataclasses.replace(auxiliary, synthetic=None)
        of_other = _of_ablation(context, (images, labels, options["groups"]), report.data.index, auxiliary, choices)
        rest["ablation"] = {"own": _leakage(results["leave_one_out"][FULL]), "other_images": of_other}
    return {"audit": results, "aop": {name: results[name]["lira"]["aop"] for name in targets}, **rest}


def name_classes(records: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    """Call the classes of an audit's ``records``, which knows numbers alone, by the names of the data."""
    named = {str(number): name for number, name in enumerate(names)}
    for table in records.values():
        for row in (table["classes"] or {"rows": ()})["rows"]:
            row["label"] = named.get(row["label"], row["label"])


def _of_ablation(
    context: Context,
    pool: tuple[Images, Tensor, Tensor | None],
    index: Tensor,
    auxiliary: Auxiliary,
    choices: Choices,
) -> dict[str, dict[str, Any]]:
    """What Students of the ablation with other images leak: their shadow Students, each attacked from the others.

    No model is under attack, so that nothing is said of one, nor of the positive control that it would stand beside.

    Args:
        pool: images, labels and groups of the run's audit; index: the examples that it attacked.
        auxiliary, choices: of the run's audit, which decide population, queries, level and units.
    """
    images, labels, groups = (None if each is None else rows_of(each, index) for each in pool)
    attacks = [each for each in ablation.ATTACKS if each != "rmia" or auxiliary.population is not None]
    choices = dataclasses.replace(choices, attacks=attacks, targets="shadows", leave_out_duplicates=False)
    shadows = shadow_students.load(context, of_ablation=True)
    shadows = dataclasses.replace(shadows, keep=shadows.keep[:, index])
    name = "the ablation's Students"
    report = audit(None, {name: shadows}, images, labels, groups=groups, auxiliary=auxiliary, choices=choices)
    return _leakage(report.to_dict()["leave_one_out"][name])


def _leakage(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attack -> mean AUC over the models of a recipe, its interval and the spread of models."""
    kept = ("mean", "sd", "interval")
    return {name: {key: recipe[name]["auc"][key] for key in kept} for name in ablation.ATTACKS if name in recipe}
