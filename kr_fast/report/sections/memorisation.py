"""Memorisation of the generator: are its images nearer to training images than to held-out ones?"""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.tables import interval, number


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The section; nothing for a run of a version that did not measure it.

    Args:
        summary: the run's; its ``memorisation`` holds the figures of
            :mod:`kr_fast.recycling.stages.generation.memorisation`.
    """
    if not (figures := summary.get("memorisation")):
        return
    yield "heading", "What the generator memorised"
    yield "text", words(figures)
    yield "table", table(figures)


def words(figures: Mapping[str, Any]) -> str:
    """How it was measured, and what the last checkpoint shows."""
    last, count = figures["rows"][-1], figures["compared"]
    shown = "are" if last["interval"][0] > 0.5 else "are not"
    text = (
        f"{figures['images']} images of each checkpoint, by the sampling before tuning: the share that is nearer to "
        f"the nearest of {count} training images than to that of {count} validation images, 0.5 being chance, with a "
        f"95 % interval, and the ratio of the median distances. Images of the last one {shown} seen to be nearer to "
        "training images. A few copies among many images are not seen in this, nor much where there are few validation "
        "images."
    )
    if figures["limit"] < 1 and figures["rows"][-1]["share"] > figures["limit"]:
        text += f" Training ended there, above the limit of {figures['limit']:g}; checkpoints above it are not used."
    return text


def table(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row for each checkpoint."""
    rows = [["step", "share nearer to training", "95 % interval", "ratio of medians"]]
    for row in figures["rows"]:
        rows.append([str(row["step"]), number(row["share"]), interval(row["interval"]), number(row["ratio"])])
    return rows
