"""Every number and name that Python, C++, CUDA and Triton share, written once. A test compares them with ``csrc``."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kr::Dtype
# kr::TargetKind; top-k rows become probabilities.
TARGET_KINDS = {"logits": 0, "probs": 1, "log_probs": 2, "topk_smooth": 1, "topk_renorm": 1}
DIVERGENCES = {"kl": 0, "cross": 1, "decoupled": 2}  # kr::Divergence
LOSS_STATISTICS = 5  # floats of a row that a forward pass keeps for its backward: kr::cuda::kDistillationStats
METRICS = {
    "kl": torch.float32,
    "agreement": torch.bool,
    "teacher_confidence": torch.float32,
    "teacher_entropy": torch.float32,
    "cross_entropy": torch.float32,
    "student_correct": torch.bool,
    "teacher_correct": torch.bool,
}  # kr::MetricOutputs
SIGNALS = ("phi", "loss", "entropy", "modified_entropy", "confidence", "correct")  # in the order of kr::SignalOutputs
VARIANCES = ("per_example", "fixed", "fixed_raw", "shrinkage")  # kr::Variance
PREDICATES = ("ratio", "ratio_strict", "reciprocal")  # kr::Predicate
ACTIVATIONS = (None, "relu", "gelu", "silu")  # kr::Activation
LIRA_PRIOR = 8.0  # kr::kLiraPrior


def empty_metrics(input: Tensor, labels: Tensor | None) -> list[Tensor]:
    """The outputs of distillation_metrics, in the order of METRICS; without labels the last three are absent."""
    rows, dtypes = input.shape[0], METRICS.values()
    return [input.new_empty(rows, dtype=dtype) for dtype in (dtypes if labels is not None else [*dtypes][:4])]


def public_name(target_type: str, divergence: str) -> str:
    """The function that a user of the distillation losses called, for error messages."""
    if target_type.startswith("topk"):
        return "distillation_loss_topk"
    return {"kl": "distillation_loss", "cross": "soft_cross_entropy", "decoupled": "dkd_loss"}[divergence]
