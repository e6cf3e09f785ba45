"""Kernels of the family ``membership`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import codes, native, registry
from kr_fast.backends.native import address


@registry.kernel("membership_signals", "cpu", refuses=native.cpu_tensors(torch.float32, torch.bfloat16, torch.float16))
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = {name: torch.empty(len(logits), dtype=torch.float32) for name in want}
    sizes, signals = (
        (len(logits), logits.shape[1], logits.stride(0)),
        [address(out.get(name)) for name in codes.SIGNALS],
    )
    native.cpu.membership_signals(logits.data_ptr(), *sizes, labels.data_ptr(), *signals, torch.get_num_threads())
    return [out[name] for name in want]


@registry.kernel("lira", "cpu", refuses=native.cpu_tensors(torch.float32))
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    queries, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    scores = torch.empty(targets, examples, dtype=torch.float64)
    inputs, sizes = (phi.data_ptr(), keep.data_ptr(), address(target)), (queries, examples, models, targets)
    method = (online, codes.VARIANCES.index(variance))
    return scores, native.cpu.lira(*inputs, *sizes, *method, scores.data_ptr(), torch.get_num_threads())


@registry.kernel("roc", "cpu", refuses=native.cpu_tensors(torch.float64))
def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    thresholds = torch.empty_like(scores)
    tp, fp = torch.empty(len(scores), dtype=torch.int64), torch.empty(len(scores), dtype=torch.int64)
    points = native.cpu.roc(
        scores.data_ptr(), members.data_ptr(), len(scores), thresholds.data_ptr(), tp.data_ptr(), fp.data_ptr()
    )
    return thresholds[:points], tp[:points], fp[:points]


@registry.kernel("bootstrap_auc", "cpu", refuses=native.cpu_tensors(torch.float64))
def bootstrap_auc(inside: Tensor, outside: Tensor, limits: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    auc = torch.empty(replicates, dtype=torch.float64)
    tp = torch.empty(replicates, len(limits), dtype=torch.int64)
    counts = (inside.data_ptr(), outside.data_ptr(), len(inside), limits.data_ptr(), len(limits))
    outputs = (auc.data_ptr(), tp.data_ptr())
    native.cpu.bootstrap_auc(*counts, replicates, seed, *outputs, torch.get_num_threads())
    return auc, tp


@registry.kernel("attack_r", "cpu", refuses=native.cpu_tensors(torch.float32, torch.float64))
def attack_r(phi: Tensor, keep: Tensor, target: Tensor | None) -> Tensor:
    queries, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    share = torch.empty(targets, examples, dtype=torch.float64)
    inputs, sizes = (phi.data_ptr(), keep.data_ptr(), address(target)), (queries, examples, models, targets)
    double = phi.dtype == torch.float64
    native.cpu.attack_r(*inputs, double, *sizes, share.data_ptr(), torch.get_num_threads())
    return share


@registry.kernel("best_threshold", "cpu", refuses=native.cpu_tensors(torch.float64))
def best_threshold(values: Tensor, held: Tensor, leave_out: bool) -> Tensor:
    examples, models = values.shape
    thresholds = torch.empty(models if leave_out else 1, dtype=torch.float64)
    native.cpu.best_threshold(
        values.data_ptr(),
        held.data_ptr(),
        examples,
        models,
        not leave_out,
        thresholds.data_ptr(),
        torch.get_num_threads(),
    )
    return thresholds


@registry.kernel("rmia", "cpu", refuses=native.cpu_tensors(torch.float32, torch.float64))
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    count = torch.empty(p_x.shape[-1], dtype=torch.int64)
    sizes = (len(p_x) if p_x.ndim == 2 else 1, p_x.shape[-1], p_z.shape[-1])
    rule = (p_x.dtype == torch.float64, gamma, codes.PREDICATES.index(predicate))
    native.cpu.rmia(p_x.data_ptr(), p_z.data_ptr(), *sizes, *rule, count.data_ptr(), torch.get_num_threads())
    return count
