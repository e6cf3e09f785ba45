"""How good classifiers and generated images are: plain functions of logits, labels and features."""

from kr_fast.metrics.classification import Evaluation, evaluate, macro_auc

__all__ = ["Evaluation", "evaluate", "macro_auc"]
