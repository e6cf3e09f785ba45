"""``kr-fast distil``: a Student from a Teacher and a generator that are there."""

import argparse

from kr_fast.cli import options
from kr_fast.cli.run import finished, planned


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.recycling.commands import DISTIL
    from kr_fast.recycling.config import RecycleConfig

    parser = subparsers.add_parser(
        "distil",
        help="distil a Student from a Teacher and a generator, or ready images, of your own",
        description="Distil a Student from the Teacher of --teacher on images of --generator, neither of which is "
        "trained. Validation images of --data choose the period, test images give the figures at the end; no attack is "
        "run. The same command continues a training that was stopped.",
    )
    options.add_preset(parser, options.OF_STUDENTS)
    options.add_flags(parser, RecycleConfig, DISTIL)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Distil, print the verdict and the table; returns the exit code."""
    from kr_fast.recycling.commands import DISTIL
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.pipeline import distil_config, recycle
    from kr_fast.recycling.presets import preset

    config = distil_config(options.config_from(arguments, RecycleConfig, DISTIL.name, preset, DISTIL))
    if arguments.dry_run:
        return planned(config)
    return finished(recycle(config))
