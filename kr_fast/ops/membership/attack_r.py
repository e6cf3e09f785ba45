"""Attack-R for every target from one array of shadow signals."""

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import without_backward

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attack_r(phi: Tensor, keep: Tensor, *, target: Tensor | None = None) -> Tensor:
    """The share of the shadows that did not hold the example whose phi is at most the target's, averaged over queries.

    A share is rounded in float32, of no shadows it is 0.

    Args:
        phi: ``[A, N, M]`` float: query, example, model; infinities are ordered, NaN is refused.
        keep: ``[M, N]`` bool: the example was in the model's training set.
        target: ``[A, N, K]`` of models outside ``phi``, or None to score each of the M models against the others.
    Returns: float64 ``[M or K, N]`` on phi's device.
    Raises: TypeError or ValueError naming the argument.
    """
    op = "attack_r"
    _check.past_dispatcher(op, phi=phi, target=target)
    _check.tensor(op, "phi", phi, ndim=3, dtypes=FLOATS)
    queries, examples, models = phi.shape
    _check.tensor(op, "keep", keep, ndim=2, dtypes=(torch.bool,))
    if keep.shape != (models, examples):
        _check.fail(op, "keep", f"have shape [M, N] = [{models}, {examples}]", keep)
    if queries == 0:
        _check.fail(op, "phi", "hold at least one query", phi)
    if target is not None:
        _check.tensor(op, "target", target, ndim=3, dtypes=FLOATS)
        if target.shape[:2] != phi.shape[:2]:
            _check.fail(op, "target", f"have shape [{queries}, {examples}, K]", target)
    for name, value in (("phi", phi), ("target", target)):
        if value is not None and bool(torch.isnan(value).any()):
            _check.fail(op, name, "not hold NaN", f"{int(torch.isnan(value).sum())} NaN")
    narrow = all(value is None or value.dtype != torch.float64 for value in (phi, target))
    dtype = torch.float32 if narrow else torch.float64
    device = registry.device_for(op, phi.device, Call(phi.device.type, dtype))
    values, seen = (None if value is None else value.to(device, dtype).contiguous() for value in (phi, target))
    run = registry.resolve(op, Call(device.type, dtype))
    share = run(values, keep.to(device).contiguous(), seen).to(phi.device)
    return without_backward(op, share, phi, target)
