"""What a differentially private run leaves in ``release/`` besides Student and ledger: the data card."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kr_fast.recycling.context import Context
from kr_fast.report.exported import data_card
from kr_fast.runtime.storage import files


def write(context: Context, metrics: Mapping[str, Any]) -> None:
    """Write the card of the synthetic images.

    Args:
        metrics: the dictionary of metrics.json, of which the card takes what no real image is in.
    """
    folder, images = context.folder, np.load(context.folder.images, mmap_mode="r")
    counts = np.bincount(np.load(folder.labels), minlength=context.data.num_classes)
    facts = {"format": "npy", "count": len(images), "shape": list(images.shape[1:]), "counts": counts.tolist()}
    files.write_text(folder.set_card, data_card.text(metrics, {**facts, "column": None, "files": []}))
