"""Labelled image sets as uint8 tensors, with fixed train / validation / test splits."""

from kr_fast.data.augment import Augment
from kr_fast.data.sources import Dataset, Split, load, to_float

__all__ = ["Augment", "Dataset", "Split", "load", "to_float"]
