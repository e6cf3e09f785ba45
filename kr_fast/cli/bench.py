"""``kr-fast bench``: times against what one would write without this package, as ratios within one run."""

import argparse
import json
from pathlib import Path
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.text import aligned

KINDS = {
    "loss": "the distillation loss, forward and backward",
    "training": "training steps of classifiers and of diffusion UNets",
    "privacy": "private training steps, beside plain ones and Opacus",
    "models": "many models on the same images",
    "audit": "membership attacks, their signals and statistics",
}
REGRESSION = 3  # exit code


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.benchmarks.config import BenchConfig, CasesConfig

    words = "times beside torch, torch.compile and other baselines; each result is checked before the clock starts"
    parser = subparsers.add_parser("bench", help=words, description=words)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    words = "images per second, with and without a sink"
    synthesis = kinds.add_parser("synthesis", help=words, description=words)
    options.add_flags(synthesis, BenchConfig)
    synthesis.set_defaults(run=run_synthesis)
    for name, words in {**KINDS, "all": "all of these, and synthesis as it is by default"}.items():
        cases = kinds.add_parser(name, help=words, description=words)
        options.add_flags(cases, CasesConfig)
        cases.set_defaults(run=run_cases)


def run_synthesis(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and a plot."""
    from kr_fast.benchmarks import results
    from kr_fast.benchmarks.config import BenchConfig
    from kr_fast.benchmarks.throughput import scheduler_of

    config = options.config_from(arguments, BenchConfig, "bench")
    case = config.case()
    scheduler_of(case)  # an unknown one is refused before a process starts
    old = results.read(config.compare, "synthesis") if config.compare else None
    Path(config.out).mkdir(parents=True, exist_ok=True)  # what cannot be written is not measured
    return _finish(_synthesis(config, case), config, old)


def run_cases(arguments: argparse.Namespace) -> int:
    """Measure one kind or all, print tables, write JSON and plots."""
    import torch

    from kr_fast.benchmarks import cases, results
    from kr_fast.benchmarks.case import measure
    from kr_fast.benchmarks.config import BenchConfig, CasesConfig
    from kr_fast.runtime.errors import fail
    from kr_fast.runtime.log import logger

    config = options.config_from(arguments, CasesConfig, "bench")
    device, kinds = config.where, list(KINDS) if arguments.kind == "all" else [arguments.kind]
    chosen = {kind: [case for case in cases.of(kind, device) if config.cases in case.name] for kind in kinds}
    chosen = {kind: found for kind, found in chosen.items() if found}
    synthesis = arguments.kind == "all" and not config.cases
    if not chosen and not synthesis:
        fail("bench", "cases", f"be part of the name of a case of {arguments.kind} on {device}", config.cases or "all")
    names = {name for found in chosen.values() for case in found for name in case.providers}
    if unknown := [name for name in config.only if name not in names]:
        fail("bench", "only", f"name baselines of these cases ({', '.join(sorted(names))})", ", ".join(unknown))
    wanted = [*chosen, *(["synthesis"] if synthesis else [])]
    olds = {kind: results.read(config.compare, kind) for kind in wanted} if config.compare else {}
    Path(config.out).mkdir(parents=True, exist_ok=True)  # what cannot be written is not measured
    if config.threads:
        torch.set_num_threads(config.threads)
    status = 0
    for kind, found in chosen.items():
        rows = []
        for case in found:
            logger.info("measuring %s", case.name)
            rows.append(measure(case, config.repeats, config.only))
        result = {"kind": kind, "machine": results.machine(device), "cases": rows}
        status = max(status, _finish(result, config, olds.get(kind)))
    if synthesis:
        other = BenchConfig(device=config.device, threads=config.threads)
        status = max(status, _finish(_synthesis(other, other.case()), config, olds.get("synthesis")))
    return status


def _synthesis(config: Any, case: Any) -> dict[str, Any]:
    from kr_fast.benchmarks import results
    from kr_fast.benchmarks.throughput import measure
    from kr_fast.runtime.log import logger

    found = measure(case, config.providers, config.repeats, lambda name: logger.info("measuring %s", name))
    machine = results.machine(case.device) | {"threads": case.threads}  # of the providers' own processes
    return {"kind": "synthesis", "machine": machine, **found}


def _finish(result: dict[str, Any], config: Any, old: dict[str, Any] | None) -> int:
    """Print and write one result; REGRESSION where a ratio has fallen below that of ``old``."""
    from kr_fast.benchmarks import results
    from kr_fast.report import plots
    from kr_fast.runtime.storage import files

    kind, out = result["kind"], Path(config.out)
    print(throughput(result) if kind == "synthesis" else results.table(result))
    files.write_text(out / f"{kind}.json", json.dumps(result, indent=1) + "\n")
    draw = plots.throughput if kind == "synthesis" else plots.ratios
    files.write_bytes(out / f"{kind}.png", draw(result))
    print(f"written: {out / kind}.json, {out / kind}.png")
    if old is None:
        return 0
    lines, fallen = results.compare(old, result, config.margin)
    print("\n".join(lines))
    return REGRESSION if fallen else 0


def throughput(result: dict[str, Any]) -> str:
    """One line per provider; the ratios are of images/s to the first provider's."""
    title = "images/s,into the sink,NFE images/s,of matrix peak,peak memory,PSNR to exact,ratio"
    rows = [["", *title.split(",")]]
    first = next(iter(result["providers"].values()))["images_per_second"]
    for name, p in result["providers"].items():
        rate = p["images_per_second"]
        cells = [f"{rate:.1f}", f"{p['sink']['images_per_second']:.1f}" if "sink" in p else "-"]
        cells += [f"{p['evaluations_per_second']:.0f}", f"{p['share_of_matrix_peak']:.1%}"]
        cells += [f"{p['peak_bytes'] / 2**20:.0f} MiB", "equal" if p["psnr"] is None else f"{p['psnr']:.0f} dB"]
        rows.append([name, *cells, f"{rate / first:.2f}x"])
    rows += [[name, f"not measured: {reason}"] for name, reason in result["skipped"].items()]
    case = f"{result['case']['model']}, {result['device']}, torch {result['torch']}"
    return "\n".join([case, *aligned(rows)])
