"""The page of several runs that differ in their seed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kr_fast.report import render
from kr_fast.report.render import Block
from kr_fast.report.tables import interval, number

SHARES = ("accuracy", "gap")  # in the last word of a path: shown in percent


def blocks(summary: dict[str, Any]) -> Iterator[Block]:
    """What ``summary.json`` holds."""
    seeds, decisions = summary["seeds"], summary["decisions"]
    yield "text", f"Seeds {', '.join(map(str, seeds))}: each is a run of its own, in seed-{seeds[0]} and so on."
    counts = [f"{word} {decisions.count(word)}" for word in dict.fromkeys(decisions)]
    yield "text", f"Verdicts: {', '.join(counts)}."
    yield "table", table(summary)
    yield "text", explanation(summary)
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]
    yield "code", json.dumps(summary["config"], indent=1)


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Mean, standard deviation, interval and the values of each figure."""
    level = f"{100 * summary['level']:g} % interval of the mean"
    rows = [["figure", "mean", "standard deviation", level, *(f"seed {seed}" for seed in summary["seeds"])]]
    for row in summary["rows"]:
        percent = row["path"].endswith(SHARES)
        scale, digits = (100, 2) if percent else (1, 1 if row["path"] == "seconds" else 3)
        unit = ", points" if row["path"].endswith("gap") else ", %" if percent else ""
        ends = None if row["interval"] is None else [scale * end for end in row["interval"]]
        sd = number(None if row["sd"] is None else scale * row["sd"], digits)
        values = [number(float(scale * value), digits) for value in row["values"]]
        cells = [number(float(scale * row["mean"]), digits), sd, interval(ends, digits)]
        rows.append([row["title"] + unit, *cells, *values])
    return rows


def explanation(summary: dict[str, Any]) -> str:
    """What the spread is of."""
    words = (
        "Intervals are Student's t over the runs: they say where the mean over all seeds may be, and take the data as "
        "given. How far another seed may be from it the standard deviation says. Those of single runs, over records, "
        "are in their own reports."
    )
    if summary["cut_by_seed"]:
        words += " The data have no splits of their own, so each seed has other training, validation and test images."
    return words


def write(out: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.html`` and ``summary.md``."""
    render.write_html(out / "summary.html", summary["title"], blocks(summary), {})
    render.write_markdown(out / "summary.md", summary["title"], blocks(summary), {})
