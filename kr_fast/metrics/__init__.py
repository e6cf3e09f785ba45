"""How good classifiers and generated images are: plain functions of logits, labels and features."""

from kr_fast.metrics.classification import Evaluation, evaluate, macro_auc
from kr_fast.metrics.generated import frechet_distance, kernel_distance, neighbourhood_figures
from kr_fast.metrics.generated_set import set_figures

__all__ = [
    "Evaluation",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "macro_auc",
    "neighbourhood_figures",
    "set_figures",
]
