"""docs/measured/bench.md and README's table from results of ``kr-fast bench``: ``python bench/measurements_page.py``.

``kr-fast bench all --out bench/results/MACHINE`` leaves them; MACHINE is a name of letters, digits and underscores.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_page import markdown

from kr_fast.data.printable import counted
from kr_fast.runtime.text import short_duration

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, README = ROOT / "bench" / "results", ROOT / "docs" / "measured" / "bench.md", ROOT / "README.md"
TITLES = {
    "loss": "Distillation loss, forward and backward",
    "training": "Training steps",
    "privacy": "Private training steps",
    "models": "Many models on the same images",
    "audit": "Attacks and their statistics",
    "synthesis": "Synthesis",
}
# README's table: the machine, and of each row its kind, its case there, what it is called here, its baselines.
MACHINE = "epyc_avx2"
ROWS = (
    (
        "loss",
        "distillation_loss 4096x100 float32 cpu",
        "`distillation_loss`, forward and backward, 4096x100",
        {"eager": "torch eager", "compiled": "compiled"},
    ),
    (
        "training",
        "training step, unet 32-64-64 28 px",
        "a training step with `optimize(training=True)`, 28 px UNet, batch 64",
        {"eager_nchw": "torch eager", "eager_nhwc": "in channels_last", "compile": "compiled"},
    ),
    (
        "training",
        "training step, resnet14 28 px",
        "the same of a ResNet-14 of 16 channels, 28 px, batch 64",
        {"eager_nchw": "torch eager", "eager_nhwc": "in channels_last", "compile": "compiled"},
    ),
    (
        "models",
        "8 x resnet20, 256 images, float32",
        "`ModelArray`, 8 ResNet-20, 256 images",
        {"strong_loop": "folded and compiled loop", "vmap": "`vmap`", "eager_nchw": "eager loop"},
    ),
    (
        "audit",
        "membership_signals 100000x10 cpu",
        "`membership_signals`, 100,000 x 10",
        {"eager": "torch eager", "compiled": "compiled"},
    ),
)
START = """# Results of `kr-fast bench`

Written by `python bench/measurements_page.py` from the JSON files that `kr-fast bench` left under
[bench/results](../../bench/results). Times are medians of runs taken in turns; a baseline's figure is how many times as
long as kr_fast it takes in the same run. Each result was found right before its clock started. GB/s count the least
bytes that the work reads and writes; beside them the share of what a copy reaches in the same run, which is more than
all of it where the data stay in a cache.

"""


def page(folder: Path = RESULTS) -> str:
    """The whole text."""
    parts = []
    for machine in sorted({path.parent for path in folder.glob("*/*.json")}):
        found = [
            json.loads((machine / f"{kind}.json").read_text()) for kind in TITLES if (machine / f"{kind}.json").exists()
        ]
        parts.append(f"## {_machine(found[0]['machine'])}\n")
        for result in found:
            text = synthesis(result) if result["kind"] == "synthesis" else cases(result)
            threads = result["machine"]["threads"]
            others = "" if threads == found[0]["machine"]["threads"] else f", {counted(threads, 'thread')}"
            parts.append(f"### {TITLES[result['kind']]}{others}\n\n{text}")
    return START + ("\n".join(parts) if parts else "Nothing has been measured yet.\n")


def _machine(facts: Mapping[str, Any]) -> str:
    where = facts["gpu"] or f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads"
    return f"{where}; torch {facts['versions']['torch'].partition('+')[0]}; {facts['date']}"


def readme(folder: Path = RESULTS) -> str:
    """README's table, with the line above it that says where it was measured."""
    results = {kind: json.loads((folder / MACHINE / f"{kind}.json").read_text()) for kind in {row[0] for row in ROWS}}
    table = [["case", "kr_fast", "as long takes"]]
    for kind, name, label, baselines in ROWS:
        found = next(case["providers"] for case in results[kind]["cases"] if case["case"] == name)
        others = ", ".join(f"{text} {found[key]['ratio']:.1f}x" for key, text in baselines.items())
        table.append([label, short_duration(found["kr_fast"]["seconds"]), others])
    return f"{_machine(results['loss']['machine'])}, float32; ratios within one run.\n\n{markdown(table)}"


def with_table(text: str, table: str) -> str:
    """README's text with the table in its place."""
    start, end = "<!-- kr-fast bench -->\n", "<!-- end -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    return f"{before}{start}{table}{end}{after}"


def cases(result: Mapping[str, Any]) -> str:
    """A line for each case, a column for each baseline."""
    names = list(dict.fromkeys(name for case in result["cases"] for name in case["providers"] if name != "kr_fast"))
    bound = any("gb_per_s" in case["providers"].get("kr_fast", {}) for case in result["cases"])
    rows = [["case", "kr_fast", *(["GB/s, of a copy"] if bound else []), *names]]
    for case in result["cases"]:
        ours = case["providers"].get("kr_fast")
        if ours is None:
            continue
        row = [case["case"], short_duration(ours["seconds"])]
        if bound:
            row.append(f"{ours['gb_per_s']:.1f}, {ours['share_of_copy']:.0%}" if "gb_per_s" in ours else "")
        rows.append([*row, *(f"{case['providers'][n]['ratio']:.2f}x" if n in case["providers"] else "" for n in names)])
    return markdown(rows)


def synthesis(result: Mapping[str, Any]) -> str:
    """A line for each provider."""
    rows = [["images/s", "sampling", "into files", "PSNR to the exact tier"]]
    for name, found in result["providers"].items():
        into = f"{found['sink']['images_per_second']:.1f}" if "sink" in found else ""
        psnr = "equal" if found["psnr"] is None else f"{found['psnr']:.0f} dB"
        rows.append([name, f"{found['images_per_second']:.1f}", into, psnr])
    case = result["case"]
    about = (
        f"{case['model']}, {case['scheduler']}, {case['steps']} steps, batch {case['batch']}, {case['images']} images."
    )
    return f"{about}\n\n{markdown(rows)}"


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(with_table(README.read_text(), readme()))
