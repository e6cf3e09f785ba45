"""What a membership attack reads from a model's answer to one example."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.backends.codes import SIGNALS
from kr_fast.ops import _check
from kr_fast.ops._library import call, define

OP = "membership_signals"


def _fake(logits, labels, want, validate=False):
    return [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in want.split(",")]


@define("membership_signals(Tensor logits, Tensor labels, str want, bool validate=False) -> Tensor[]", fake=_fake)
def _impl(logits, labels, want, validate=False):
    if validate:  # here and not where the op is traced
        _check_values(logits, labels)
    run = registry.resolve(OP, ClassesCall(logits.device.type, logits.dtype, logits.shape[1]))
    return [value.float() for value in run(logits, labels, tuple(want.split(",")))]


def membership_signals(
    logits: Tensor, labels: Tensor, want: tuple[str, ...] = ("phi",), *, validate_args: bool = True
) -> dict[str, Tensor]:
    """Statistics of logits ``z`` at the true class ``y``, from logits and never from probabilities.

    ``phi = z_y - logsumexp_{j != y} z_j`` (the logit of ``p_y``, finite where ``p_y`` rounds to 1);
    ``loss = -ln p_y = ln(1 + e^-phi)``; ``confidence = p_y``; ``entropy = -sum p_j ln p_j``;
    ``modified_entropy = -(1 - p_y) ln p_y - sum_{j != y} p_j ln(1 - p_j)``; ``correct`` = 1 if ``y`` is the first
    largest logit, else 0.

    Args:
        logits: ``[..., C]`` float32, bfloat16, float16 or float64, C >= 2. -inf rules a class out; NaN, +inf and rows
            of -inf only are refused.
        labels: int64 (or another integer dtype) in [0, C), the leading shape of ``logits``, or that shape and a 1.
        want: names among phi, loss, entropy, modified_entropy, confidence, correct.
        validate_args: False leaves to the caller what the values of logits and labels must be. The check reads the
            logits once more than the kernel, and waits for a GPU.
    Returns: name -> float32 of the leading shape. There is no derivative: backward through them raises.
    Raises: TypeError or ValueError naming the argument; ValueError for logits that are not finite (above).
    Source: phi: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022; modified entropy:
        Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021.
    """
    _check.tensor(OP, "logits", logits)
    if not logits.dtype.is_floating_point or logits.ndim < 1 or logits.shape[-1] < 2:
        _check.fail(OP, "logits", "be floating point [..., C] with C >= 2", logits)
    labels = _check.labels(OP, labels, logits.shape[:-1], logits.device)
    for name in want:
        if name not in SIGNALS:
            _check.fail(OP, "want", f"hold names among {', '.join(SIGNALS)}", name)
    if not want:
        return {}
    classes = logits.shape[-1]
    flat = logits.reshape(-1, classes), labels.reshape(-1).contiguous()
    values = call(torch.ops.kr_fast.membership_signals.default, *flat, ",".join(want), bool(validate_args))
    return {name: value.view(labels.shape) for name, value in zip(want, values, strict=True)}


def _check_values(logits: Tensor, labels: Tensor) -> None:
    classes = logits.shape[-1]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        _check.fail(OP, "labels", f"lie in [0, {classes})", [int(labels.min()), int(labels.max())])
    # The largest logit of a row is finite unless the row holds NaN or +inf, or is -inf throughout.
    bad = ~torch.isfinite(logits.amax(-1))
    if bool(bad.any()):
        counts = torch.isnan(logits).sum().item(), torch.isposinf(logits).sum().item()
        got = f"{int(bad.sum())} bad rows with {counts[0]} NaN and {counts[1]} +inf"
        _check.fail(OP, "logits", "not hold NaN, +inf or rows of -inf only", got)
