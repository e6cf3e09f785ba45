"""``kr-fast bench synthesis``: images a second, end to end, against what one would write without this package."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What ``kr-fast bench synthesis`` measures."""

    model: str = option(
        "unet28", "untrained network to sample: unet28 has 1.7 M weights, unet32 the widths of ddpm-cifar10",
        choices=("digits", "unet28", "unet32"),
    )  # fmt: skip
    scheduler: str = option("DDIMScheduler", "diffusers scheduler")
    steps: int = option(10, "solver steps", least=1, most=10000)
    batch: int = option(64, "images in one network call", least=1, most=1_000_000)
    images: int = option(256, "images in one timed run", least=1, most=1_000_000_000)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 for none", least=0, most=100)
    format: str = option(
        "npy", "sink of the end-to-end rate",
        choices=("npy", "npz", "webdataset", "parquet", "device", "none"),
    )  # fmt: skip
    providers: tuple[str, ...] = option(
        ("documented", "loop", "compile", "kr_fast"),
        "documented (float32, PNG by PIL), loop (channels_last, half precision on a GPU), compile (that loop under "
        "torch.compile), kr_fast",
        choices=("documented", "loop", "compile", "kr_fast"),
    )
    repeats: int = option(3, "timed runs; the fastest counts", least=1, most=1_000_000)
    device: str = option("auto", "where it runs", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads; 0 for torch's choice", least=0, most=4096)
    out: str = option("bench-synthesis", "folder for synthesis.json and synthesis.png")

    def __post_init__(self):
        check(self, "bench")
        if not self.providers:
            fail("bench", "providers", "name at least one", "none")


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("bench", help="measure synthesis throughput against diffusers and torch.compile")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    synthesis = kinds.add_parser("synthesis", help="images a second, with and without a sink")
    options.add_flags(synthesis, BenchConfig)
    synthesis.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and a plot."""
    import torch

    from kr_fast.benchmarks.throughput import Case, measure
    from kr_fast.report import plots
    from kr_fast.runtime.log import logger
    from kr_fast.runtime.storage import files

    flags = options.given(arguments, BenchConfig)
    config = options.build(BenchConfig, options.read_yaml(arguments.config, "bench"), flags, where="bench")
    if config.device == "cuda" and not torch.cuda.is_available():
        fail("bench", "device", "be cpu or auto where there is no GPU", config.device)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(
        config.model, config.scheduler, config.steps, config.batch, config.images,
        None if config.guidance_scale == 1 else config.guidance_scale,
        None if config.format == "none" else config.format, device, config.threads or torch.get_num_threads(),
    )  # fmt: skip
    found = measure(case, config.providers, config.repeats, lambda name: logger.info("measuring %s", name))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "synthesis.json", json.dumps(found, indent=2) + "\n")
    files.write_bytes(out / "synthesis.png", plots.throughput(found))
    print(table(found))
    print(f"written: {out / 'synthesis.json'}, {out / 'synthesis.png'}")
    return 0


def table(found: dict[str, Any]) -> str:
    """One line a provider; the ratios are of images/s to the first provider's."""
    rows = [
        ("", "images/s", "into the sink", "NFE images/s", "of matrix peak", "peak memory", "PSNR to exact", "ratio")
    ]
    first = next(iter(found["providers"].values()))["images_per_second"]
    for name, p in found["providers"].items():
        sink = f"{p['sink']['images_per_second']:.1f}" if "sink" in p else "-"
        rows.append(
            (
                name, f"{p['images_per_second']:.1f}", sink, f"{p['evaluations_per_second']:.0f}",
                f"{p['share_of_matrix_peak']:.1%}", f"{p['peak_bytes'] / 2**20:.0f} MiB",
                "equal" if p["psnr"] is None else f"{p['psnr']:.0f} dB", f"{p['images_per_second'] / first:.2f}x",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{found['case']['model']}, {found['device']}, torch {found['torch']}", *lines])
