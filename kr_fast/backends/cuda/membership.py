"""Kernels of the family ``membership`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.calls import ClassesCall, LiraCall
from kr_fast.backends.native import address


def _refuses_signals(call: ClassesCall) -> str | None:
    if call.classes >= 2**28:
        return f"the class count must be below 2^28, got {call.classes}"
    return native.cuda_tensors(*codes.DTYPES)(call)


@registry.kernel("membership_signals", "cuda", refuses=_refuses_signals)
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = {name: torch.empty(len(logits), dtype=torch.float32, device=logits.device) for name in want}
    with native.on(logits):
        native.cuda.membership_signals(structs.membership_signals(logits, labels, out), native.stream(logits))
    return [out[name] for name in want]


def _refuses_lira(call: LiraCall) -> str | None:
    most = getattr(native.cuda, "lira_models", 0)
    if call.models > most:
        return f"there must be at most {most} models, got {call.models}"
    return native.cuda_tensors(torch.float32)(call)


@registry.kernel("lira", "cuda", refuses=_refuses_lira)
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    _, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    freedom = codes.LIRA_PRIOR + torch.arange(models + 1, dtype=torch.float64)
    constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * freedom.log()
    constant, by_example = constant.to(phi.device), keep.T.contiguous()
    scores = torch.empty(targets, examples, dtype=torch.float64, device=phi.device)
    num_unscored = torch.zeros((), dtype=torch.int64, device=phi.device)
    with native.on(phi):
        pooled = None if variance == "per_example" else _lira_pooled(phi, keep, by_example, target, variance)
        buffers = {"constant": constant.data_ptr(), "pooled": address(pooled), "num_unscored": num_unscored.data_ptr()}
        for first in range(0, targets, native.cuda.lira_models):  # more than one part for targets from outside only
            part = None if target is None else target[:, :, first : first + native.cuda.lira_models].contiguous()
            rows = scores[first : first + native.cuda.lira_models]
            call = structs.lira(phi, by_example, part, online, variance, rows)
            native.cuda.lira(call, buffers, native.stream(phi))
    return scores, int(num_unscored)


def _lira_pooled(phi: Tensor, keep: Tensor, by_example: Tensor, target: Tensor | None, variance: str) -> Tensor:
    """Variances over all examples ``[M, 2 sides]``, each target left out, or ``[1, 2]`` for targets from outside."""
    queries, examples, models = phi.shape
    targets, raw = 1 if target is not None else models, variance == "fixed_raw"
    blocks = min(examples, native.cuda.lira_blocks)
    partial = torch.empty(blocks, targets, 2, 2, dtype=torch.float64, device=phi.device)
    call = structs.lira(phi, by_example, target, True, variance, None)
    native.cuda.lira_pool(call, partial.data_ptr(), native.stream(phi))
    first, second = partial.sum(0).unbind(2)
    held = keep.sum(1)
    counts = torch.stack([held.sum(), (examples - held).sum()])[None]
    if target is None:
        counts = counts - torch.stack([held, examples - held], 1)
    counts = (queries * counts).clamp_min(1)
    return (second / counts - (first / counts).square()).clamp_min(0) if raw else first / counts


@registry.kernel("rmia", "cuda", refuses=native.cuda_tensors(torch.float32, torch.float64))
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    x, z = (value.view(-1, value.shape[-1]) for value in (p_x, p_z))
    queries, num_x = x.shape
    below = torch.empty(queries, num_x, dtype=torch.int32, device=x.device)
    with native.on(x):
        ordered = z.sort(1).values
        call = structs.rmia(x, ordered, gamma, predicate)
        native.cuda.rmia_below(call, below.data_ptr(), native.stream(x))
        if queries == 1:
            return below[0].long()
        rank = torch.searchsorted(ordered, z, out_int32=True)
        count = torch.zeros(num_x, dtype=torch.int64, device=x.device)
        native.cuda.rmia_vote(call, below.data_ptr(), rank.data_ptr(), count.data_ptr(), native.stream(x))
    return count
