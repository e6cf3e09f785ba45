"""Stage 1, data: what the splits hold, and their fingerprint, so that a run never goes on with other images."""

import hashlib
from typing import Any

from kr_fast.data import Dataset
from kr_fast.recycling.context import Context
from kr_fast.runtime.errors import fail

SPLITS = ("train", "val", "test")


def run(context: Context) -> dict[str, Any]:
    """Sizes, classes and SHA-256 of the splits, and how their images were read."""
    data = context.data
    sizes = {name: len(getattr(data, name)) for name in SPLITS}
    return {
        **sizes, "class_names": list(data.class_names), "notes": list(data.notes), "sha256": fingerprint(data),
    }  # fmt: skip


def fingerprint(data: Dataset) -> str:
    """SHA-256 over images and labels of all splits."""
    digest = hashlib.sha256()
    for name in SPLITS:
        split = getattr(data, name)
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.numpy().data)
    return digest.hexdigest()


def check(context: Context) -> None:
    """Refuse to continue a run whose data have changed since it was started."""
    before = context.journal.done("data")
    if before is not None and before["sha256"] != (now := fingerprint(context.data)):
        rule = f"be those that the run in {context.out} was started with (SHA-256 {before['sha256'][:12]})"
        fail("run", "data", rule, f"others in {context.config.data} ({now[:12]})")
