"""``kr-fast run``: the whole pipeline."""

import argparse
import dataclasses

from kr_fast.cli import options


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.recycling.config import RecycleConfig

    parser = subparsers.add_parser(
        "run",
        help="Teacher, generator, distillation, audit and report on one data set",
        description="Run Knowledge Recycling end to end. The same command continues a run that was stopped.",
    )
    parser.add_argument("--preset", default=None, help="digits, small (28 px on a small machine) or toy")
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file with any of the options below")
    options.add_flags(parser, RecycleConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Build the configuration, run, print the table."""
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.pipeline import recycle
    from kr_fast.recycling.presets import preset
    from kr_fast.runtime import state

    names = {field.name for field in dataclasses.fields(RecycleConfig)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    start = {} if arguments.preset is None else preset(arguments.preset)
    config = options.build(RecycleConfig, start, options.read_yaml(arguments.config, "run"), flags, where="run")
    result = recycle(config)
    if state.current().is_main:
        print(table(result.metrics))
        print(f"report: {result.report}")
    return 0


def table(metrics: dict) -> str:
    """The last screen: Teacher, Student and what the attack found."""
    teacher, student = metrics["teacher"]["test_accuracy"], metrics["student"]["test_accuracy"]
    rows = [("", "Teacher", "Student", "gap")]
    rows.append(("test accuracy", f"{teacher:.4f}", f"{student:.4f}", f"{metrics['cas_gap']:+.4f}"))
    if metrics["audit"]:
        for name, attack in (("LiRA online AUC", "lira"), ("LiRA offline AUC", "lira_offline"), ("loss AUC", "loss")):
            found = [metrics["audit"][model][attack] for model in ("teacher", "student")]
            cells = [f"{f['auc']:.3f} [{f['auc_ci'][0]:.3f}, {f['auc_ci'][1]:.3f}]" for f in found]
            rows.append((name, *cells, f"{found[0]['auc'] - found[1]['auc']:+.3f}"))
        aop = [metrics["aop"][model] for model in ("teacher", "student")]
        rows.append(("AOP", f"{aop[0]:.4f}", f"{aop[1]:.4f}", f"{aop[0] - aop[1]:+.4f}"))
    rows.append(("seconds", f"{sum(metrics['stages'].values()):.0f}", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
