"""Results of ``kr-fast bench``: what they were measured on, their table, and whether a ratio has fallen."""

import datetime
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kr_fast.benchmarks.case import OURS
from kr_fast.runtime.errors import fail
from kr_fast.runtime.text import aligned, short_duration
from kr_fast.runtime.versions import processor, versions

OURS_TOO = ("optimized",)  # beside "kr_fast triton" and the like: plain steps by kr_fast.optimize
MACHINES = {"processor": "on another processor", "gpu": "on another GPU", "threads": "with other threads"}
ROOT = Path(__file__).resolve().parents[2]


def machine(device: str) -> dict[str, Any]:
    """Processor, threads, versions, commit (None outside a checkout) and date."""
    from kr_fast.backends import native

    return {
        "processor": processor(),
        "instruction_set": native.isa() or "no extension",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": versions("torch", "triton", "diffusers", "numpy"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit(root: Path = ROOT) -> str | None:
    """Of the checkout in ``root``, marked where files but its own results differ from it; None outside a checkout."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    name = git("rev-parse", "--short", "HEAD")
    return (f"{name}-dirty" if changed else name) or None


def table(result: Mapping[str, Any]) -> str:
    """A line for each case and provider: time, ratio to ours, GB/s, share of a copy's bandwidth, error."""
    rows = [["case", "provider", "time", "to kr_fast", "GB/s", "of copy", "error"]]
    for case in result["cases"]:
        name = case["case"]
        for provider, row in case["providers"].items():
            ratio = f"{row['ratio']:.2f}x" if provider != OURS and "ratio" in row else ""
            bound = "gb_per_s" in row
            cells = [f"{row['gb_per_s']:.1f}", f"{row['share_of_copy']:.0%}"] if bound else ["", ""]
            rows.append([name, provider, short_duration(row["seconds"]), ratio, *cells, f"{row['error']:.1e}"])
            name = ""
        for provider, reason in case["skipped"].items():
            rows.append([name, provider, f"not measured: {reason}"])
            name = ""
    return "\n".join(aligned(rows))


def read(path: str | Path, kind: str) -> dict[str, Any]:
    """An earlier result, by its file or by the folder that holds it.

    Raises: UserError if there is none of this kind.
    """
    path = Path(path)
    file = path / f"{kind}.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        fail("bench", "compare", f"be {kind}.json of an earlier run or a folder that holds it", f"{path} ({error})")
    if not isinstance(result, dict) or result.get("kind") != kind:
        fail("bench", "compare", f"be a result of kr-fast bench {kind}", str(file))
    return result


def ratios(result: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(case, baseline) -> how many times as long as ours it took; what is ours too is no baseline."""
    if "cases" in result:
        return {
            (case["case"], name): row["ratio"]
            for case in result["cases"]
            for name, row in case["providers"].items()
            if not name.startswith(OURS) and name not in OURS_TOO and "ratio" in row
        }
    providers, case = result["providers"], result["case"]
    if OURS not in providers:
        return {}
    named = f"{case['model']}, {case['scheduler']} {case['steps']} steps, batch {case['batch']}, {case['device']}"
    if case.get("guidance_scale") is not None:
        named += f", guidance {case['guidance_scale']:g}"
    ours = providers[OURS]["images_per_second"]
    return {(named, name): ours / row["images_per_second"] for name, row in providers.items() if name != OURS}


def compare(old: Mapping[str, Any], new: Mapping[str, Any], margin: float) -> tuple[list[str], bool]:
    """Lines on every ratio of both, and whether one has fallen by more than ``margin`` of what it was.

    Ratios within one run are compared, not times, so that another speed of the machine does not count.
    Raises: UserError if they have no case and baseline in common.
    """
    before, after = ratios(old), ratios(new)
    both = [key for key in before if key in after]
    if not both:
        fail("bench", "compare", "have a case and a baseline in common with this run", "none")
    rows, fallen = [["case", "baseline", "before", "now", ""]], False
    for key in both:
        worse = after[key] < before[key] * (1 - margin)
        fallen |= worse
        rows.append([*key, f"{before[key]:.2f}x", f"{after[key]:.2f}x", "fallen" if worse else ""])
    lines = aligned(rows)
    if missing := sum(key not in after for key in before):
        lines.append(f"{missing} earlier ratios were not measured now")
    if further := sum(key not in before for key in after):
        lines.append(f"{further} ratios have no earlier one")
    for fact, words in MACHINES.items():
        if (a := old.get("machine", {}).get(fact)) != (b := new.get("machine", {}).get(fact)):
            lines.append(f"measured {words}: {a}, now {b}")
    return lines, fallen
