"""The data against the configuration: what cannot work is refused, what a reader has to know becomes a note."""

import math

import torch

from kr_fast.ensemble import accuracy
from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.membership.attacks.canaries import LEAST, MOST_SHARE
from kr_fast.models import most_levels
from kr_fast.recycling import given, tracking
from kr_fast.recycling.commands import of_command
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import checks as dp_checks
from kr_fast.recycling.preflight import division, memory_and_disk, networks
from kr_fast.recycling.stages import dataset, shadows, teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import tuning
from kr_fast.recycling.stages.generation.sampling import default_sampling
from kr_fast.recycling.stages.given_teacher import given_teacher
from kr_fast.recycling.trained_generator import OTHER_DATA
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail

ASKED = 512  # validation images on which a given Teacher is evaluated
SIGNIFICANT = 1e-4  # probability of guessing as badly, below which a Teacher is refused
SMALL = (
    128  # images (or groups) in a pool whose random halves may have too few; above it the probability is below 1e-30
)


def check(context: Context) -> list[str]:
    """Refuse a run that cannot come to its end; returns the notes of one that can.

    Nothing is written, and no network is trained. Raises: UserError naming the option to change.
    """
    options(context)
    tracking.check(context.config.log_with)
    notes = [*splits(context), *dp_checks.check(context)]
    sizes = networks.sizes(context)
    if context.config.budget:
        context.ledger = division.ledger(context)
    memory_and_disk.check(division.planned(context), sizes)
    if context.config.teacher:
        notes += _given_teacher(context)
    if context.config.generator:
        notes += given.check(context)
        usual = default_sampling(context, given.STEP)
        tried = (sampling for sampling, _, _ in tuning.expected(context.config, usual))
        for sampling in dict.fromkeys((usual, *tried)):
            gkd.drawn(context, sampling, 1)  # a sampler refuses what the network's own scheduler does not do
    return notes


def options(context: Context) -> None:
    """Refuse options that do not fit the images or the number of processes."""
    c, world_size = context.config, context.runtime.world_size
    if c.precision != "auto" and (device := context.runtime.device.type) != "cpu":
        fail("run", "precision", f"be auto on a {device} device, which trains in what it is fastest in", c.precision)
    height, width, _ = context.data.image_shape
    if not c.generator and len(c.generator_widths) > (most := most_levels(height, width)):
        rule = f"be at most {most} widths for images of {height} x {width}, as each but the first halves them"
        fail("run", "generator_widths", rule, f"{len(c.generator_widths)}: {list(c.generator_widths)}")
    for name in ("teacher_shift", "generator_shift", "student_shift"):
        if getattr(c, name) >= min(height, width):
            fail("run", name, f"be below the shorter side of the images, {min(height, width)}", getattr(c, name))
    if c.audit_canaries:
        count, classes = len(context.data.train), context.data.num_classes
        limits = [(int(MOST_SHARE * count), f"a tenth of {count} training images")]
        if (groups := context.data.train.groups) is not None:
            limits.append((len(groups.unique()), "one for each group of training images"))
        for most, why in limits:
            if c.audit_canaries > most:
                few = f"be 0 where {most}, {why}, are fewer than {LEAST}"
                fail("run", "audit_canaries", f"be at most {most}, {why}" if most >= LEAST else few, c.audit_canaries)
        if classes < 2:
            fail("run", "audit_canaries", "be 0 where there is no other class to be labelled with", c.audit_canaries)
    if not c.generator and c.generator_batch_size % world_size:
        fail("run", "generator_batch_size", f"be a multiple of {world_size} processes", c.generator_batch_size)


def splits(context: Context) -> list[str]:
    """Notes on splits that are small, lack a class or share images; too few for the audit are refused."""
    c, data = context.config, context.data
    notes = []
    pool = len(data.train) + len(data.test)
    groups = shadows.groups(context)
    if c.num_shadows and (pool if groups is None else len(groups.unique())) <= SMALL:
        least = int(keep_matrix(c.num_shadows, pool, seeds.derive(c.seed, "shadows"), groups).sum(1).min())
        if least < 2:
            rule = f"leave each shadow model two of the {pool} training and test images (0 skips the audit)"
            fail("run", "num_shadows", rule, f"{c.num_shadows}, of which one has {least}")
    trains_teacher = not c.teacher and "teacher" in of_command(c, {"teacher": None})
    if trains_teacher and c.teacher_batch_size > len(data.train):
        notes.append(f"teacher_batch_size is {c.teacher_batch_size}: each step takes all {len(data.train)} images")
    for whose in ("teacher", "student"):
        if getattr(c, f"{whose}_choose") == "auc" and len(data.val.labels.unique()) < 2:
            rule = "be accuracy where all validation images are of one class, which has no AUC"
            fail("run", f"{whose}_choose", rule, "auc")
    for name in ("val", "test"):
        counts = torch.bincount(getattr(data, name).labels, minlength=data.num_classes)
        if missing := torch.nonzero(counts == 0)[:, 0].tolist():
            named = ", ".join(data.class_names[index] for index in missing[:5]) + (", ..." if missing[5:] else "")
            notes.append(
                f"the {dataset.TITLES[name]} split lacks {len(missing)} of {data.num_classes} classes ({named})"
            )
    further = len(dataset.population(context))
    if not further:
        audited = ", and its audit has no population" if c.num_shadows else ""
        notes.append(f"every validation image is a training or test image too: the run chooses by them{audited}")
    elif further < len(data.val) and c.num_shadows:
        left_out = f"{len(data.val) - further} validation images"
        notes.append(f"{left_out}, which are training or test images too, are left out of the population")
    return notes


def _given_teacher(context: Context) -> list[str]:
    """Evaluate the user's Teacher; refuse one that is clearly worse than guessing, note one that is not better."""
    model, subset = teacher.build(context), dataset.thinned(context.data.val, ASKED)
    correct, guessed = accuracy(model, subset), 1 / context.data.num_classes
    if _at_most(round(correct * len(subset)), len(subset), guessed) < SIGNIFICANT:
        rule = f"be no worse than guessing, which is right about {guessed:.3f} of the validation images"
        fail("run", "teacher", rule, f"{correct:.3f} (are its classes in the order {_order(context)}?)")
    own = given_teacher(context.config.teacher, context.config.teacher_arch, context.config.teacher_width)
    notes = []
    if own.data is not None and own.data["sha256"] != context.data.fingerprint:
        notes.append(OTHER_DATA.format("the Teacher"))
    if not (note := teacher.chance(correct, subset)):
        return notes
    return [
        *notes,
        f"{note}; it is shown x / 127.5 - 1 of pixels x, and has its classes in the order {_order(context)}",
    ]


def _order(context: Context) -> str:
    names = context.data.class_names
    return ", ".join(names[:4]) + (", ..." if names[4:] else "")


def _at_most(hits: int, count: int, rate: float) -> float:
    """P(X <= hits) of a binomial."""
    return math.fsum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(hits + 1))
