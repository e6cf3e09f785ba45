"""docs/measured/bench.md from the results of ``kr-fast bench``: ``python bench/measurements_page.py``.

``kr-fast bench all --out bench/results/MACHINE`` leaves them; MACHINE is a name of letters, digits and underscores.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_page import markdown

from kr_fast.runtime.text import short_duration

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "measured" / "bench.md"
TITLES = {
    "loss": "Distillation loss, forward and backward",
    "training": "Training steps",
    "models": "Many models on the same images",
    "audit": "Attacks and their statistics",
    "synthesis": "Synthesis",
}
START = """# Results of `kr-fast bench`

Written by `python bench/measurements_page.py` from the JSON files that `kr-fast bench all` left under
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
            parts.append(f"### {TITLES[result['kind']]}\n\n{text}")
    return START + ("\n".join(parts) if parts else "Nothing has been measured yet.\n")


def _machine(facts: Mapping[str, Any]) -> str:
    where = facts["gpu"] or f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads"
    return f"{where}; torch {facts['versions']['torch'].partition('+')[0]}; {facts['date']}"


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
