"""Kernels of the family ``membership`` in ``kr_fast._cpu``."""

import torch
from torch import Tensor

from kr_fast.backends import native, registry, structs


@registry.kernel("membership_signals", "cpu", refuses=native.cpu_tensors(torch.float32, torch.bfloat16, torch.float16))
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = {name: native.empty(len(logits)) for name in want}
    native.cpu.membership_signals(structs.membership_signals(logits, labels, out), torch.get_num_threads())
    return [out[name] for name in want]


@registry.kernel("lira", "cpu", refuses=native.cpu_tensors(torch.float32))
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    scores = _by_target(phi, target)
    call = structs.lira(phi, keep, target, online, variance, scores)
    return scores, native.cpu.lira(call, torch.get_num_threads())


def _by_target(phi: Tensor, target: Tensor | None) -> Tensor:
    """Empty, ``[targets, examples]``."""
    return native.empty((phi if target is None else target).shape[2], phi.shape[1], dtype=torch.float64)


@registry.kernel("roc", "cpu", refuses=native.cpu_tensors(torch.float64))
def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    thresholds = torch.empty_like(scores)
    tp, fp = native.empty(2, len(scores), dtype=torch.int64)
    tensors = {"scores": scores, "members": members, "thresholds": thresholds, "tp": tp, "fp": fp}
    points = native.cpu.roc({**_addresses(tensors), "n": len(scores)})
    return thresholds[:points], tp[:points], fp[:points]


def _addresses(tensors: dict[str, Tensor]) -> structs.Struct:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@registry.kernel("bootstrap_auc", "cpu", refuses=native.cpu_tensors(torch.float64))
def bootstrap_auc(inside: Tensor, outside: Tensor, limits: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    auc = native.empty(replicates, dtype=torch.float64)
    tp = native.empty(replicates, len(limits), dtype=torch.int64)
    tensors = {"inside": inside, "outside": outside, "limits": limits, "auc": auc, "tp": tp}
    sizes = {"groups": len(inside), "num_limits": len(limits), "replicates": replicates, "seed": seed}
    native.cpu.bootstrap_auc(_addresses(tensors) | sizes, torch.get_num_threads())
    return auc, tp


@registry.kernel("attack_r", "cpu", refuses=native.cpu_tensors(torch.float32, torch.float64))
def attack_r(phi: Tensor, keep: Tensor, target: Tensor | None) -> Tensor:
    share = _by_target(phi, target)
    native.cpu.attack_r(structs.attack_r(phi, keep, target, share), torch.get_num_threads())
    return share


@registry.kernel("best_threshold", "cpu", refuses=native.cpu_tensors(torch.float64))
def best_threshold(values: Tensor, members: Tensor, leave_out: bool) -> Tensor:
    examples, models = values.shape
    thresholds = native.empty(models if leave_out else 1, dtype=torch.float64)
    tensors = {"values": values, "members": members, "thresholds": thresholds}
    sizes = {"examples": examples, "models": models, "leave_out": leave_out}
    native.cpu.best_threshold(_addresses(tensors) | sizes, torch.get_num_threads())
    return thresholds


@registry.kernel("rmia", "cpu", refuses=native.cpu_tensors(torch.float32, torch.float64))
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    count = native.empty(p_x.shape[-1], dtype=torch.int64)
    native.cpu.rmia(structs.rmia(p_x, p_z, gamma, predicate), count.data_ptr(), torch.get_num_threads())
    return count
