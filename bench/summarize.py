"""pytest-benchmark's JSON as a Markdown table of ratios: ``python bench/summarize.py RESULT.json ...``."""

import json
import sys
from collections import defaultdict
from pathlib import Path


def notes_of(extra: dict) -> str:
    """What a benchmark noted beside its time, in brackets."""
    forms = {
        "gb_per_s": "{} GB/s",
        "percent_of_copy": "{} % of copy",
        "peak_mib": "peak {} MiB",
        "gradient_error": "error {:.1e}",
        "error": "error {:.1e}",
    }
    notes = [form.format(extra[name]) for name, form in forms.items() if name in extra]
    return f" [{', '.join(notes)}]" if notes else ""


def rows(path: Path) -> list[str]:
    """A line for each group: medians of every provider, and how many times as long as ours the others take."""
    groups, notes = defaultdict(dict), {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        extra, provider = entry.get("extra_info", {}), entry["params"]["provider"]
        # Of one call and of the whole work: a graph may hold several calls, a slow baseline does a share of the work.
        each = extra.get("calls", 1) * extra.get("share", 1)
        groups[entry["group"]][provider] = entry["stats"]["median"] * 1e3 / each
        notes[entry["group"], provider] = notes_of(extra)
    lines = []
    for group, result in groups.items():
        ours = result.get("kr_fast")
        cells = [
            f"{name} {ms:.3g} ms" + (f" ({ms / ours:.2f}x)" if ours and name != "kr_fast" else "") + notes[group, name]
            for name, ms in sorted(result.items(), key=lambda item: item[0] != "kr_fast")
        ]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(rows(Path(name))))
