"""The least memory and disk that a run needs; one that needs more than is free is refused.

Sums hold what is certain: weights, gradients and optimizer, what a training step saves of its batch, images of a
period, files. What libraries need besides is not included, so a run that passes can still be too large.
"""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from kr_fast.ensemble.inference.queries import AUGMENTS
from kr_fast.models import padded_size
from kr_fast.recycling.commands import of_command
from kr_fast.recycling.context import Context
from kr_fast.recycling.preflight.networks import Size, Sizes
from kr_fast.recycling.stages import shadows
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import few_step
from kr_fast.recycling.stages.generation.generator import early_step
from kr_fast.recycling.stages.generation.posthoc_ema import KEPT, SNAPSHOTS
from kr_fast.runtime.errors import fail
from kr_fast.runtime.memory import free_memory

POSITION = "the position of the training, twice while it is written"
SIGNALS = 3  # arrays [A, N, M] of float32 that an audit holds
ID_AND_LABEL = 16  # bytes per synthetic image


@dataclasses.dataclass(frozen=True)
class Need:
    """``size`` bytes for ``what`` in ``stage``; a lower value of the option ``option`` makes it smaller."""

    stage: str
    what: str
    option: str
    size: int


def memory_needs(context: Context, sizes: Sizes) -> list[Need]:
    """What the stages hold in memory at a time, on this process's device."""
    return _of_command(context, _in_memory(context, sizes))


def _of_command(context: Context, needs: list[Need]) -> list[Need]:
    of_stages = of_command(context.config, {need.stage: need for need in needs})
    return [need for need in needs if need.stage in of_stages]


def _in_memory(context: Context, sizes: Sizes) -> list[Need]:
    c, train = context.config, len(context.data.train)
    pool, workers = train + len(context.data.test), shadows.workers(context)
    guided = 2 if any(scale != 1 for scale in (c.guidance_scale, *c.tune_guidance_scale)) else 1
    drawers = min(2, workers)
    call = drawers * 2 * guided * c.micro_batch * sizes.generator.widest
    batch, share = min(c.teacher_batch_size, train), c.generator_batch_size // context.runtime.world_size
    if c.epsilon:  # rows of a call of the network
        batch, share = c.dp_physical_batch, c.dp_physical_batch * c.dp_multiplicity
    needs = [] if c.teacher else _training("teacher", "teacher", sizes.teacher, batch)
    if not c.generator:
        needs += _generating("generator", context, sizes.generator, share, train)
    if c.few_steps:
        needs += _few_step("few_step", context, sizes.generator)
    for stage, images in (("tuning", "trial_images"), ("gkd", "images")):
        needs += _distilling(stage, context, sizes.student, images)
        needs.append(Need(stage, "the images of network calls", "micro_batch", call))
    if not c.num_shadows:
        return needs
    half = max(pool // 2, 1)
    trained = _training("shadows", "teacher", sizes.teacher, min(c.teacher_batch_size, half))
    students = _distilling("shadow_students", context, sizes.student, "images")
    if c.audit_generator == "retrained":
        # The few-step one is made when the training of the many-step one has ended.
        made = [_generating("shadow_students", context, sizes.generator, c.generator_batch_size, half)]
        made += [_few_step("shadow_students", context, sizes.generator)] if c.few_steps else []
        students += max(made, key=lambda needs: sum(need.size for need in needs))
    twins = []
    if c.audit_canaries:
        twins = _training("canaries", "teacher", sizes.teacher, min(c.teacher_batch_size, train))
        twins = _times(min(workers, c.num_shadows), twins)
        each = _distilling("canary_students", context, sizes.student, "images")
        twins += _times(min(workers, c.num_students), each)
    models = c.num_shadows * sizes.teacher.state + c.num_students * sizes.student.state
    signals = 4 * SIGNALS * len(AUGMENTS[c.audit_augment]) * pool * (c.num_shadows + c.num_students)
    return [
        *needs,
        *_times(min(workers, c.num_shadows), trained),
        *twins,
        *_times(min(workers, c.num_students), students),
        Need("audit", "shadow models", "num_shadows", models),
        Need("audit", "the signals of shadow models", "num_shadows", signals),
    ]


def _times(count: int, needs: list[Need]) -> list[Need]:
    """The needs of ``count`` trainings at a time."""
    return [dataclasses.replace(need, size=count * need.size) for need in needs]


def _training(stage: str, whose: str, size: Size, batch: int) -> list[Need]:
    """Weights, gradients, momentum and the best epoch's weights; what a step saves."""
    return [
        Need(stage, "weights, gradients and optimizer", f"{whose}_width", 4 * size.state),
        Need(stage, "the images of a step", f"{whose}_batch_size", batch * size.saved),
    ]


def _generating(stage: str, context: Context, size: Size, batch: int, images: int) -> list[Need]:
    """Weights, gradients, AdamW's two moments and the moving averages; what a step saves; images on a GPU."""
    averages = len(KEPT) if context.config.ema_lengths else 0
    needs = [
        Need(stage, "weights, gradients and optimizer", "generator_widths", (5 + averages) * size.state),
        Need(stage, "the images of a step", "generator_batch_size", batch * size.saved),
    ]
    if context.runtime.device.type != "cpu":
        needs.append(Need(stage, "the training images", "data", math.prod(context.data.image_shape) * images))
    return needs


def _few_step(stage: str, context: Context, size: Size) -> list[Need]:
    """As of a generator's training, on as many trajectories of padded images as are drawn at a time."""
    c, (height, width, channels) = context.config, context.data.image_shape
    batch, levels = c.generator_batch_size, len(c.generator_widths)
    pixels = padded_size(height, levels) * padded_size(width, levels) * channels
    drawn = 4 * pixels * few_step.DRAWN * batch * (c.few_steps + 1)
    return [*_generating(stage, context, size, batch, 0), Need(stage, "trajectories", "generator_batch_size", drawn)]


def _distilling(stage: str, context: Context, size: Size, option: str) -> list[Need]:
    """A Student's training on a period of as many images as the option says."""
    count = getattr(context.config, option)
    if option == "images":
        count = max((count, *context.config.tune_images))
    period = Need(stage, "the images of a period", option, count * _image(context))
    return [*_training(stage, "student", size, min(context.config.student_batch_size, count)), period]


def _image(context: Context) -> int:
    """Bytes of a synthetic image with its id and label."""
    return math.prod(context.data.image_shape) + ID_AND_LABEL


def disk_needs(context: Context, sizes: Sizes) -> list[Need]:
    """Files of the run, also those that a stage removes at its end."""
    c, data = context.config, context.data
    image, pool = _image(context), len(data.train) + len(data.test)
    generators = 2 if c.few_steps else 1  # of each shadow Student
    of_period = max((c.images, *c.tune_images))
    students, saved = c.num_students, c.checkpoints * (1 + len(c.ema_lengths)) + len(early_step(c))
    kept = len(KEPT) * (SNAPSHOTS + c.checkpoints + 1) * sizes.generator.state
    needs = [
        Need("teacher", "weights", "teacher_width", sizes.teacher.state),
        *([Need("few_step", "weights", "generator_widths", sizes.generator.state)] if c.few_steps else []),
        Need("gkd", "weights", "student_width", sizes.student.state),
        Need("gkd", "synthetic images", "images", of_period * image),
    ]
    if not c.generator:
        needs += [
            Need("generator", "checkpoints", "checkpoints", saved * sizes.generator.state),
            Need("generator", POSITION, "generator_widths", 2 * 4 * sizes.generator.state),
            *([Need("generator", "averages that are kept", "ema_lengths", kept)] if c.ema_lengths else []),
        ]
    if c.num_shadows:
        needs += [
            Need("shadows", "shadow Teachers", "num_shadows", c.num_shadows * (sizes.teacher.state + pool)),
            Need("shadow_students", "shadow Students", "student_shadows", students * (sizes.student.state + pool)),
            Need("audit", "signals and scores", "num_shadows", 8 * pool * (c.num_shadows + students)),
        ]
    if c.keeps_sets:
        shared = of_period if c.fixed_images and not c.ablation else gkd.most_drawn(c)
        needs.append(Need("shadow_students", "shared images", "periods", shared * image))
    if c.ablation:
        needs.append(Need("ablation", "weights", "student_width", 3 * sizes.student.state))
        further = students * (sizes.student.state + pool)
        needs.append(Need("shadow_students", "the ablation's shadow Students", "student_shadows", further))
    if students and c.audit_generator == "retrained":
        needs.append(
            Need("shadow_students", "generators", "student_shadows", students * generators * sizes.generator.state)
        )
    if c.audit_canaries:
        needs.append(Need("canaries", "twin Teachers", "num_shadows", c.num_shadows * sizes.teacher.state))
        needs.append(Need("canary_students", "twin Students", "student_shadows", students * sizes.student.state))
    if c.num_shadows and c.audit_control:
        needs.append(Need("audit", "the positive control", "teacher_width", sizes.teacher.state))
    return _of_command(context, needs)


def stages(needs: Sequence[Need]) -> dict[str, int]:
    """Bytes of each stage."""
    sizes: dict[str, int] = {}
    for need in needs:
        sizes[need.stage] = sizes.get(need.stage, 0) + need.size
    return sizes


def free_disk(out: Path) -> int:
    """Bytes that can still be written where ``out`` is, or will be."""
    existing = next(above for above in (out, *out.absolute().parents) if above.exists())
    return shutil.disk_usage(existing).free


def check(context: Context, sizes: Sizes) -> None:
    """Refuse a run that needs more memory or disk than is free, naming the option that takes most of it."""
    needs, device = memory_needs(context, sizes), context.runtime.device
    stage, size = max(stages(needs).items(), key=lambda each: each[1])
    if size > (free := free_memory(device)):
        most = max((need for need in needs if need.stage == stage), key=lambda need: need.size)
        why = f"stage {stage} needs {amount(size)} of memory, most of it for {most.what}, and {amount(free)} are free"
        fail("run", most.option, f"be smaller, as {why}", _value(context, most.option))
    needs = disk_needs(context, sizes)
    size = sum(need.size for need in needs) - written(context.out)
    if size > (free := free_disk(context.out)):
        most = max(needs, key=lambda need: need.size)
        why = f"files take {amount(size)} more, most of it for {most.what}, and {amount(free)} of the disk are free"
        fail("run", most.option, f"be smaller, as {why}", _value(context, most.option))


def written(out: Path) -> int:
    """Bytes that a stopped run has written."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0


def amount(size: float) -> str:
    """``12.3 MB``."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _value(context: Context, option: str) -> object:
    value = getattr(context.config, option)
    return list(value) if isinstance(value, tuple) else value
