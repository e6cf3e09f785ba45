"""``kr-fast bench synthesis``: images per second, end to end, against what one would write without this package."""

import argparse
import json
from pathlib import Path
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.text import aligned


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from kr_fast.benchmarks.config import BenchConfig

    parser = subparsers.add_parser("bench", help="measure synthesis throughput against diffusers and torch.compile")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    synthesis = kinds.add_parser("synthesis", help="images per second, with and without a sink")
    options.add_flags(synthesis, BenchConfig)
    synthesis.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and a plot."""
    from kr_fast.benchmarks.config import BenchConfig
    from kr_fast.benchmarks.throughput import measure
    from kr_fast.report import plots
    from kr_fast.runtime.log import logger
    from kr_fast.runtime.storage import files

    config = options.config_from(arguments, BenchConfig, "bench")
    result = measure(config.case(), config.providers, config.repeats, lambda name: logger.info("measuring %s", name))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "synthesis.json", json.dumps(result, indent=2) + "\n")
    files.write_bytes(out / "synthesis.png", plots.throughput(result))
    print(table(result))
    print(f"written: {out / 'synthesis.json'}, {out / 'synthesis.png'}")
    return 0


def table(result: dict[str, Any]) -> str:
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
    case = f"{result['case']['model']}, {result['device']}, torch {result['torch']}"
    return "\n".join([case, *aligned(rows)])
