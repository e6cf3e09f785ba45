"""The data: sizes of the splits and their fingerprint, so that a run never continues with other images."""

import dataclasses
from typing import Any

from kr_fast.data import Split, shared_images
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import duplicates
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import ImageRows

SPLITS = ("train", "val", "test")
TITLES = {"train": "training", "val": "validation", "test": "test"}


def run(context: Context) -> dict[str, Any]:
    """Sizes, classes and SHA-256 of the splits, how images were read, duplicates, precision, notes of the checks."""
    data = context.data
    sizes = {name: len(getattr(data, name)) for name in SPLITS}
    notes = [*data.notes, *context.notes]
    facts = {"class_names": list(data.class_names), "notes": notes, "sha256": data.fingerprint}
    facts["duplicates"] = duplicates.record(context)
    return {**sizes, **facts, "precision": dataclasses.asdict(context.precision)}


def population(context: Context) -> Split:
    """Validation images that are not among those under attack, which are the training and test images."""
    val, pool = context.data.val, ImageRows(context.data.train.images, context.data.test.images)
    return val.rows(~shared_images(val.images, pool))


def thinned(split: Split, most: int) -> Split:
    """About ``most`` images, evenly through the split, which may be sorted by class."""
    return split.rows(slice(None, None, -(-len(split) // most)))


def check(context: Context) -> None:
    """Refuse to continue a run whose data have changed since it was started."""
    before = context.journal.done("data")
    if before is not None and before["sha256"] != (now := context.data.fingerprint):
        rule = f"be those that the run in {context.out} was started with (SHA-256 {before['sha256'][:12]})"
        fail("run", "data", rule, f"others in {context.config.data} ({now[:12]})")
