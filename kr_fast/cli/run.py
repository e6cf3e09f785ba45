"""``kr-fast run``: the whole pipeline."""

import argparse
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.text import aligned


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.recycling.config import RecycleConfig

    parser = subparsers.add_parser(
        "run",
        help="Teacher, generator, distillation, audit and report on one data set",
        description="Run Knowledge Recycling end to end. The same command continues a run that was stopped.",
    )
    options.add_preset(parser, options.OF_STUDENTS, options.OF_RUNS)
    words = "runs, of so many seeds from --seed on, in OUT/seed-SEED, and a summary of their spread in OUT/release"
    parser.add_argument("--seeds", type=int, default=None, metavar="COUNT", help=words)
    options.add_flags(parser, RecycleConfig)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Build the configuration, run, print the verdict and the table; returns the exit code."""
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.pipeline import recycle
    from kr_fast.recycling.presets import implied, preset
    from kr_fast.recycling.several_seeds import seeds_of

    config = options.config_from(arguments, RecycleConfig, "run", preset, implied=implied)
    if arguments.dry_run:
        if arguments.seeds is None:
            return planned(config)
        seeds = seeds_of(config, arguments.seeds)
        return planned(config, f"# {len(seeds)} runs such as this one, with seeds from {config.seed} on")
    if arguments.seeds is not None:
        return of_seeds(config, arguments.seeds)
    return finished(recycle(config))


def planned(config: Any, further: str = "") -> int:
    """Print what ``--dry-run`` of ``config`` tells, and a ``further`` line; returns the exit code."""
    from kr_fast.recycling.pipeline import dry_run
    from kr_fast.runtime import state

    text = dry_run(config)  # on every rank
    if state.current().is_main:
        print(text)
        if further:
            print(further)
    return 0


def finished(result: Any) -> int:
    """Print the verdict and the table of a run; returns the exit code."""
    from kr_fast.membership.verdict.decision import GATE, fails
    from kr_fast.report import run_audit, tables
    from kr_fast.report.exported import guaranteed
    from kr_fast.report.guarantee import contradiction
    from kr_fast.report.sections import verdict
    from kr_fast.runtime import state

    if not state.current().is_main:
        return 0
    print("\n".join(verdict.lines(result.metrics["verdict"], result.metrics.get("guarantee"))))
    print()
    print(table(result.metrics))
    if rates := tables.throughput(result.metrics):
        print(rates)
    if "budget" in result.metrics:
        print(run_audit.more_time(result.metrics))
    if guarantee := result.metrics.get("guarantee"):
        wrong = contradiction(result.metrics)
        print(wrong or guaranteed.sentences(guarantee)[0])
        if guarantee["private"] and not wrong:
            held_back = result.metrics["verdict"]["decision"] == "do not share"
            what = "is what that holds for" if held_back else "may be handed on"
            print(f"{result.out / 'release'} alone {what}: the figures above are of real images, without noise")
    print(f"report: {result.report}")
    return GATE if fails(result.metrics["verdict"]) else 0


def of_seeds(config: Any, count: int) -> int:
    """Run each seed, print a line of each and the table of all; returns the exit code."""
    from kr_fast.membership.verdict.decision import GATE, fails
    from kr_fast.recycling.several_seeds import recycle_seeds
    from kr_fast.report import seeds_document
    from kr_fast.runtime import state

    main = state.current().is_main

    def tell(seed: int, result: Any) -> None:
        if main:
            print(f"seed {seed}: {result.metrics['verdict']['decision']}; report: {result.report}", flush=True)

    done = recycle_seeds(config, count, tell)
    if not main:
        return 0
    print("\n".join(aligned(seeds_document.table(done.summary))))
    print(f"summary: {done.report}")
    return GATE if any(fails(result.metrics["verdict"]) for result in done.results) else 0


def table(metrics: dict) -> str:
    """The last screen: Teacher, Student and the AUC of the attacks on each."""
    from kr_fast.report import run_audit

    audit, best = metrics["audit"], run_audit.strongest(metrics)
    titles = run_audit.models(metrics, images=False)
    accuracy = [metrics["teacher" if name == "teacher" else "student"]["test_accuracy"] for name in titles]
    against = titles[best].split(" (")[0] if best == run_audit.FULL else "Student"
    rows = [["", *titles.values(), f"Teacher - {against}"]]
    rows.append(["test accuracy", *(f"{each:.4f}" for each in accuracy), f"{metrics['cas_gap']:+.4f}"])
    if metrics["teacher"].get("test_auc") is not None:
        auc = [metrics["teacher" if name == "teacher" else "student"]["test_auc"] for name in titles]
        rows.append(["test AUC", *(f"{each:.4f}" for each in auc), f"{auc[0] - auc[-1]:+.4f}"])
    if audit:
        for attack in run_audit.HEADLINE:
            rows += run_audit.of_attack(audit, list(titles), best, attack)
        aop = [metrics["aop"][name] for name in titles]
        rows.append(["AOP", *(f"{each:.4f}" for each in aop), f"{aop[0] - metrics['aop'][best]:+.4f}"])
        for name in ("teacher", "student"):
            if row := (audit.get("canaries") or {}).get(name):
                rows.append([f"canaries of the {name.capitalize()}", f"LiRA online AUC {run_audit.auc(row)}"])
        for name, title in ((run_audit.CONTROL, "positive control"), (run_audit.RELEASED, "released images")):
            for attack in audit.get(name, {}):
                if name == run_audit.RELEASED or attack == audit["setting"]["targets"][name]["primary"]:
                    words = audit["setting"]["attacks"][attack]["title"]
                    rows.append([title, f"{words} AUC {run_audit.auc(audit[name][attack])}"])
        if calibrated := audit.get("released_calibrated"):
            for name, words in (("all_periods", "all periods"), ("last_period", "the last period")):
                cell = f"calibrated by other pipelines AUC {run_audit.auc(calibrated[name]['offline'])}"
                rows.append([f"released images, {words}", cell])
    rows.append(["seconds", f"{sum(metrics['stages'].values()):.0f}"])
    return "\n".join(aligned(rows))
