"""Labelled image sets as uint8 tensors, with fixed train / validation / test splits, and their augmentation."""

from kr_fast.data.augment import Augment, Draws, shown
from kr_fast.data.duplicates import shared_images
from kr_fast.data.sources import TEST_FRACTION, VAL_FRACTION, Dataset, Split, load, load_uncut, to_float

__all__ = [
    "TEST_FRACTION", "VAL_FRACTION", "Augment", "Dataset", "Draws", "Split", "load", "load_uncut", "shared_images",
    "shown", "to_float",
]  # fmt: skip
