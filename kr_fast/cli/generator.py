"""``kr-fast generator``: a class-conditional generator alone, without Teacher, Student and audit."""

import argparse

from kr_fast.cli import options
from kr_fast.cli.run import planned
from kr_fast.runtime.text import aligned


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.recycling.commands import GENERATOR
    from kr_fast.recycling.config import RecycleConfig

    parser = subparsers.add_parser(
        "generator",
        help="train a class-conditional generator alone",
        description="Train a class-conditional generator. Its folder is what kr-fast synthesize --model, kr-fast run "
        "--generator and kr-fast distil --generator take; checkpoints are in diffusers' format in "
        "OUT/private/generator. The same command continues a training that was stopped.",
    )
    options.add_preset(parser)
    options.add_flags(parser, RecycleConfig, GENERATOR)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Train, print what each checkpoint memorised and where the last one is; returns the exit code."""
    from kr_fast.recycling.commands import GENERATOR
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.pipeline import train_generator
    from kr_fast.recycling.presets import preset
    from kr_fast.runtime import state

    config = options.config_from(arguments, RecycleConfig, GENERATOR.name, preset, GENERATOR)
    if arguments.dry_run:
        return planned(GENERATOR.of(config))
    done = train_generator(config)
    if not state.current().is_main:
        return 0
    rows = [["step", "share nearer to training images", "95 % interval"]]
    for each in done.memorisation["rows"]:
        low, high = each["interval"]
        rows.append([str(each["step"]), f"{each['share']:.3f}", f"[{low:.3f}, {high:.3f}]"])
    print("\n".join(aligned(rows)))
    rate = f" at {done.images_per_second:.0f} images/s" if done.images_per_second else ""
    print(f"{done.parameters:,} parameters, loss {done.loss:.4f}{rate}")
    print(f"{done.out}: kr-fast synthesize --model, run --generator and distil --generator take it")
    print(f"{done.checkpoint}: the last checkpoint, in diffusers' format")
    return 0
