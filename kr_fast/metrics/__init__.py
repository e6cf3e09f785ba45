"""How good classifiers and generated images are: plain functions of logits, labels and features."""

from kr_fast.metrics.classification import Evaluation, evaluate, macro_auc
from kr_fast.metrics.generated import kernel_distance, neighbourhood_figures

__all__ = ["Evaluation", "evaluate", "kernel_distance", "macro_auc", "neighbourhood_figures"]
