"""Labelled image sets as uint8 tensors, with fixed train / validation / test splits, and their augmentation."""

from kr_fast.data.augment import Augment, AugmentParams, augmented
from kr_fast.data.duplicates import SplitDuplicates, find_duplicates, shared_images
from kr_fast.data.options import ReadOptions
from kr_fast.data.sources import (
    TEST_FRACTION,
    VAL_FRACTION,
    Dataset,
    Source,
    Split,
    load,
    load_uncut,
    read,
    to_float,
)
from kr_fast.runtime.storage.image_rows import ImageRows

__all__ = ["TEST_FRACTION", "VAL_FRACTION", "Augment", "AugmentParams", "Dataset", "ReadOptions", "Source", "Split"]
__all__ += ["ImageRows", "SplitDuplicates", "find_duplicates"]
__all__ += ["augmented", "load", "load_uncut", "read", "shared_images", "to_float"]
