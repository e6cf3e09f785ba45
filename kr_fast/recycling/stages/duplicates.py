"""Images that occur again in an earlier split, whole or nearly: dropped from the later one or kept, and listed.

A test image whose near-duplicate was trained on measures what was learnt by heart, and a non-member that is nearly a
member weakens every attack. Splits that the data have themselves stay whole by default: figures on them are compared
with figures of others on the same images.
"""

import csv
import dataclasses
import io
from typing import Any

from kr_fast.data import Dataset
from kr_fast.data.duplicates import COLUMNS, duplicates_by
from kr_fast.recycling.context import Context
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

SPLITS = ("train", "val", "test")


def apply(context: Context, given: frozenset[str]) -> None:
    """Find the near-duplicates of the run's data, and drop those that its configuration asks to drop.

    Args:
        given: the splits that the data have themselves.
    Raises: UserError where nothing would be left of a split.
    """
    data, mode = context.data, context.config.duplicates
    splits = {name: getattr(data, name) for name in SPLITS}
    images, digests = ({name: getattr(split, of) for name, split in splits.items()} for of in ("images", "digests"))
    found = duplicates_by(images, digests)
    later = {"drop": {"val", "test"}, "keep": set(), "auto": {"val", "test"} - given}[mode]
    dropped = found.to_drop(later)
    for name, mask in dropped.items():
        if bool(mask.all()):
            rule = f"be keep, or the {name} split hold images without a near-duplicate in an earlier one"
            fail("run", "duplicates", rule, f"{mode} with {len(mask)} of {len(mask)} that have one")
    notes = _notes(found.counts, {name: int(mask.sum()) for name, mask in dropped.items()}, found.threshold)
    if not found.pairs.complete:
        few = f"{len(found.pairs):,} pairs of near-duplicates were found and the search stopped there"
        notes.append(f"{few}: others were not looked for (are many images blank?)")
    for note in notes:
        logger.warning("data: %s", note)
    context.duplicates, context.dropped = found, dropped
    context.data = _without(data, context.dropped, notes)


def record(context: Context) -> dict[str, Any] | None:
    """Write ``private/duplicates.csv``, by position in the splits as they were read; returns the figures of them.

    Returns: {"threshold", "spacing" (in grey levels), "complete", "exact" and "near" (numbers of images, see
        :class:`kr_fast.data.SplitDuplicates`), "dropped": {"val", "test"}}; None where they were not looked for.
    """
    found, text = context.duplicates, io.StringIO()
    if found is None:
        return None
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows(context.dropped))
    files.write_text(context.folder.duplicates, text.getvalue())
    dropped = {name: int(context.dropped[name].sum()) for name in ("val", "test")}
    facts = {"threshold": found.threshold, "spacing": found.spacing, "complete": found.pairs.complete}
    return {**facts, **found.counts, "dropped": dropped}


def _notes(counts: dict[str, dict[str, int]], dropped: dict[str, int], threshold: float) -> list[str]:
    """What a reader has to know of near-duplicates in two splits, in numbers."""
    parts = []
    for at, later in enumerate(SPLITS):
        for earlier in SPLITS[:at]:
            near, exact = (counts[kind][f"{later}_{earlier}"] for kind in ("near", "exact"))
            if near:
                parts.append(f"{near} of {later} in {earlier}" + (f" ({exact} byte-equal)" if exact else ""))
    if not parts:
        return []
    gone = " and ".join(f"{count} of {name}" for name, count in dropped.items() if count)
    what = f"{gone} are dropped" if gone else "all are kept"
    limit = f"within {threshold:.1f} grey levels"
    return [f"images with a near-duplicate ({limit}) in an earlier split: {', '.join(parts)}; {what}"]


def _without(data: Dataset, dropped: dict[str, Any], notes: list[str]) -> Dataset:
    splits = {}
    for name, mask in dropped.items():
        if bool(mask.any()):
            splits[name] = getattr(data, name).rows(~mask)
    return dataclasses.replace(data, **splits, notes=(*data.notes, *notes)) if splits or notes else data
