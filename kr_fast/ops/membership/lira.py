"""Likelihood-ratio membership scores of every target from one array of shadow signals."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import LiraCall
from kr_fast.backends.codes import VARIANCES
from kr_fast.ops import _check
from kr_fast.ops._library import without_backward

VARIANTS = ("online", "offline")


def lira(
    phi: Tensor,
    keep: Tensor,
    *,
    variant: str = "online",
    variance: str = "per_example",
    target: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Scores of :func:`kr_fast.membership.lira` and the number of (target, example) pairs that lacked shadows.

    Args:
        phi: ``[A, N, M]`` float: query, example, model.
        keep: ``[M, N]`` bool: the example was in the model's training set.
        variant: "online" or "offline".
        variance: "per_example", "fixed", "fixed_raw" or "shrinkage".
        target: ``[A, N, K]`` of models outside ``phi``, or None to score each of the M models against the others.
    Returns: (float64 ``[M or K, N]`` on phi's device, int).
    Raises: TypeError or ValueError naming the argument.
    """
    check_arguments(phi, keep, variant, variance, target)
    # An infinite phi (certainty) is ordered above all finite ones, but means and variances need a number.
    bound = 1e6
    op, models = "lira", phi.shape[2]
    run_device, given = registry.device_for(op, phi.device, LiraCall(phi.device.type, torch.float32, models)), target
    values = phi.to(run_device).float().clamp(-bound, bound).contiguous()
    target = None if target is None else target.to(run_device).float().clamp(-bound, bound).contiguous()
    run = registry.resolve(op, LiraCall(run_device.type, torch.float32, models))
    scores, num_unscored = run(values, keep.to(run_device).contiguous(), target, variant == "online", variance)
    return without_backward(op, scores.to(phi.device), phi, given), num_unscored


def check_arguments(phi: Tensor, keep: Tensor, variant: str, variance: str, target: Tensor | None) -> None:
    """What :func:`lira` refuses."""
    op = "lira"
    _check.past_dispatcher(op, phi=phi, target=target)
    _check.tensor(op, "phi", phi, ndim=3)
    queries, examples, models = phi.shape
    _check.tensor(op, "keep", keep, ndim=2, dtypes=(torch.bool,))
    if keep.shape != (models, examples):
        _check.fail(op, "keep", f"have shape [M, N] = [{models}, {examples}]", keep)
    if variant not in VARIANTS:
        _check.fail(op, "variant", f"be one of {', '.join(VARIANTS)}", variant)
    if variance not in VARIANCES:
        _check.fail(op, "variance", f"be one of {', '.join(VARIANCES)}", variance)
    if target is not None:
        _check.tensor(op, "target", target, ndim=3)
        if target.shape[:2] != phi.shape[:2]:
            _check.fail(op, "target", f"have shape [{queries}, {examples}, K]", target)
    if queries == 0:
        _check.fail(op, "phi", "hold at least one query", phi)
    for name, value in (("phi", phi), ("target", target)):
        if value is not None and bool(torch.isnan(value).any()):
            _check.fail(op, name, "not hold NaN", f"{int(torch.isnan(value).sum())} NaN")
    _check_shadows(op, keep, variant, variance, leave_one_out=target is None)


def _check_shadows(op: str, keep: Tensor, variant: str, variance: str, *, leave_one_out: bool) -> None:
    """At least one example must have the shadows that its variance needs, on each side that is used."""
    # A variance needs two shadows; a variance per example needs them without the target too.
    needed = 2 + int(leave_one_out and variance == "per_example")
    sides = [("out", (~keep).sum(0))] + ([("in", keep.sum(0))] if variant == "online" else [])
    for name, counts in sides:
        most = int(counts.max()) if counts.numel() else 0
        if counts.numel() and most < needed:
            _check.fail(op, "keep", f"give some example {needed} shadows {name} of it for {variance} variance", most)
