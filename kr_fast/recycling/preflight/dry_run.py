"""What ``kr-fast run --dry-run`` prints: the configuration as YAML, and all else as comments in it."""

from collections.abc import Sequence

import yaml

from kr_fast.recycling import given
from kr_fast.recycling.commands import COMMANDS
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import checks
from kr_fast.recycling.preflight import division, memory_and_disk, networks, time_estimate
from kr_fast.recycling.preflight.memory_and_disk import amount, disk_needs, free_disk, memory_needs
from kr_fast.recycling.stages import teacher
from kr_fast.runtime.memory import free_memory
from kr_fast.runtime.text import aligned, duration


def describe(context: Context, notes: Sequence[str]) -> str:
    """The resolved configuration, the data, the networks, and an estimate of time, memory and disk by stage.

    The text is a YAML file that ``--config`` takes.
    """
    c, data, sizes = context.config, context.data, networks.sizes(context)
    height, width, channels = data.image_shape
    splits = ", ".join(f"{len(getattr(data, name)):,} {name}" for name in ("train", "val", "test"))
    trained = sizes.teacher.parameters
    models = [
        ("Teacher", f"{c.teacher_arch} of width {c.teacher_width}", trained),
        ("Student", f"{c.student_arch} of width {c.student_width}", sizes.student.parameters),
        ("generator", f"UNet2DModel of widths {' '.join(map(str, c.generator_widths))}", sizes.generator.parameters),
    ]
    if c.generator:
        models[-1] = ("generator", ", ".join(c.generator), given.opened(c, data, context.runtime.device).parameters)
    if c.teacher:
        parameters = sum(value.numel() for value in teacher.build(context).parameters())
        models = [("Teacher", c.teacher, parameters), ("its shadows", models[0][1], trained), *models[1:]]
    if c.command == "generator":
        models = models[-1:]
    command = COMMANDS[c.command]
    lines = [
        f"A dry run of kr-fast {command.name}: nothing was trained, and nothing was written.",
        "",
        f"data: {data.name}, images of {height} x {width} x {channels}: {splits}; {data.num_classes} classes",
        *(f"data: {note}" for note in data.notes),
        *(f"{name}: {words}, {count:,} parameters" for name, words, count in models),
        f"training: {context.precision}",
        *(checks.describe(context) if c.epsilon else ()),
        *(f"note: {note}" for note in notes),
        *(division.describe(context.ledger) if context.ledger else ()),
        "",
        *_table(context, sizes),
    ]
    options = {name: v for name, v in {"out": c.out, **c.record()}.items() if name in (command.options or vars(c))}
    config = yaml.safe_dump(options, sort_keys=False, default_flow_style=None)
    return config + "\n".join(f"# {line}".rstrip() for line in lines)


def _table(context: Context, sizes: networks.Sizes) -> list[str]:
    """Stages with their estimates; those that are finished are left out."""
    if context.ledger is None:
        times = time_estimate.stages(context, time_estimate.measure(context))
    else:
        times, context = context.ledger.ahead_by_stage(), division.planned(context)
    memory, disk = (
        memory_and_disk.stages(needs) for needs in (memory_needs(context, sizes), disk_needs(context, sizes))
    )
    rows = [("stage", "time", "memory", "disk")]
    unfinished = [name for name in times if context.journal.done(name) is None]
    for name in unfinished:
        rows.append(
            (name, duration(times[name]), *(amount(each[name]) if name in each else "" for each in (memory, disk)))
        )
    most = max((memory.get(name, 0) for name in unfinished), default=0)
    total = sum(disk.get(name, 0) for name in unfinished)
    rows.append(("in all", duration(sum(times[name] for name in unfinished)), amount(most), amount(total)))
    rows.append(("free", "", amount(free_memory(context.runtime.device)), amount(free_disk(context.out))))
    words = [
        "Estimate. Time: a few steps of each network were timed, right within a factor of two if nothing else runs.",
        "Memory and disk: what is certain to be needed; libraries take more.",
        "",
    ]
    return words + aligned(rows, right=True)
