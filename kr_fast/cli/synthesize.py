"""``kr-fast synthesize``: a labelled data set from a trained generator."""

import argparse
from pathlib import Path

from kr_fast.cli import options
from kr_fast.runtime.errors import fail


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.synthesis.job import SynthesizeConfig

    parser = subparsers.add_parser(
        "synthesize",
        help="write a labelled data set from a generator, on any number of processes",
        description="Write a labelled data set. The same command continues one that was stopped; several processes "
        "(accelerate launch -m kr_fast synthesize ...) share the work.",
    )
    options.add_flags(parser, SynthesizeConfig)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Load the model, write the data set, print what was done."""
    import yaml

    from kr_fast.recycling import set_quality, trained_generator
    from kr_fast.report.sections import quality
    from kr_fast.runtime import state
    from kr_fast.runtime.storage import files
    from kr_fast.runtime.text import aligned
    from kr_fast.synthesis import synthesize
    from kr_fast.synthesis.job import SynthesizeConfig, prepare

    config, trained = options.config_from(arguments, SynthesizeConfig, "synthesize"), None
    if config.model:
        trained_generator.refuse_seeds(Path(config.model), ("synthesize", "model"))
    if config.model and trained_generator.is_run(Path(config.model)):
        trained = trained_generator.open_generator(Path(config.model), state.current().device, config.checkpoint)
    sampler, plan, used = prepare(config, trained)
    count = config.count or plan.count
    if count is None:
        fail("synthesize", "count", "be above 0 for labels without an end", config.count)
    ids = range(config.first_id, config.first_id + count)
    measured = set_quality.opened(config.quality_run, sampler, plan, ids) if config.quality_run else None
    layout = {"format": config.format, "shard_size": config.shard_size, "verify": config.verify}
    done = synthesize(sampler, plan, config.out, ids=ids, **layout)
    if state.current().is_main:
        files.write_text(done.out / "config.yaml", yaml.safe_dump(used | {"count": count}, sort_keys=False))
        rate = f", {done.written} here at {done.written / done.seconds:.0f} images/s" if done.written else ""
        print(f"{done.out}: {done.images} images in {done.shards} shards{rate}")
        if measured is not None:
            files.write_json(done.out / "quality.json", files.strict(figures := measured.figures()))
            print("\n".join(aligned(quality.set_table(figures))))
    return 0
