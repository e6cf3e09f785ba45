"""Calls as the structs of ``csrc`` that a compiled module takes: addresses, sizes and codes by the fields' names."""

import array
import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from kr_fast.backends.arguments import (
    AdamWRule,
    BatchNormAct,
    BatchNormActGradient,
    GroupNorm,
    GroupNormGradient,
    LossOptions,
    ModelResidualBlock,
    OptimizerStep,
    OptimizerTensors,
    SolverOutput,
    SolverRow,
    SolverStep,
    SolverTableStep,
)
from kr_fast.backends.codes import (
    DIVERGENCES,
    DTYPES,
    METRICS,
    PREDICATES,
    SIGNALS,
    TARGET_KINDS,
    VARIANCES,
)
from kr_fast.backends.native import address

Struct = dict[str, Any]


def distillation_loss(input, target, indices, labels, weight, options: LossOptions) -> Struct:
    """``kr::DistillationLoss``."""
    tensors = {"weight": address(weight), "indices": address(indices), "top_k": target.shape[1]}
    return {**_loss_options(options), **_logit_pair(input, target, labels), **tensors}


@functools.lru_cache(maxsize=1024)
def _loss_options(options: LossOptions) -> Struct:
    values = options._asdict()
    target_type, reduction = values.pop("target_type"), values.pop("reduction")
    values |= {"target_kind": TARGET_KINDS[target_type], "smooth_tail": target_type == "topk_smooth"}
    return values | {"divergence": DIVERGENCES[options.divergence], "mean": reduction == "mean"}


def distillation_metrics(input, target, labels, temperature: float, outputs: list[Tensor]) -> Struct:
    """``kr::DistillationMetrics`` that writes into ``outputs``, in the order of codes.METRICS."""
    addresses = itertools.zip_longest(METRICS, [output.data_ptr() for output in outputs], fillvalue=0)
    return {**_logit_pair(input, target, labels), "temperature": temperature, **dict(addresses)}


def _logit_pair(input: Tensor, target: Tensor, labels: Tensor | None) -> Struct:
    rows, classes = input.shape
    return {
        "input": input.data_ptr(),
        "target": target.data_ptr(),
        "input_dtype": DTYPES[input.dtype],
        "target_dtype": DTYPES[target.dtype],
        "rows": rows,
        "classes": classes,
        "input_stride": input.stride(0),
        "target_stride": target.stride(0),
        "labels": address(labels),
    }


def solver_step(step: SolverStep, channels_last: bool) -> Struct:
    """``kr::SolverStep``; the network's outputs are contiguous or ``channels_last``."""
    sample, cond, out = step.sample, step.model_output, step.out
    shape = sample.shape
    batch, channels = shape[0], shape[1] if len(shape) == 4 else 1
    return {
        "x": sample.data_ptr(),
        "cond": cond.data_ptr(),
        "uncond": address(step.uncond_output),
        "output_dtype": DTYPES[cond.dtype],
        "output_channels_last": channels_last,
        "ids": address(step.ids),
        "limits": address(step.limits),
        "history": [h.data_ptr() for h in step.history],
        "row": step.row.numbers(),
        "guidance": step.guidance,
        "seed": step.seed,
        "stream": step.stream,
        "batch": batch,
        "channels": channels,
        "pixels": sample.numel() // max(batch * channels, 1),
        "y": address(out.sample),
        "kept": address(out.kept),
        "input": address(out.input),
        "input_dtype": 0 if out.input is None else DTYPES[out.input.dtype],
        "copies": step.copies,
        "image": address(out.image),
        "table": None,
    }


def solver_table_step(call: SolverTableStep, channels_last: bool) -> Struct:
    """``kr::SolverStep`` whose row and tensors are those of a table."""
    inputs = (call.samples[0], call.model_output, call.uncond_output, call.ids, call.limits, [])
    options = (call.guidance, call.seed, call.stream, call.copies, SolverOutput(input=call.input, image=call.image))
    table = {name: address(getattr(call, name)) for name in ("step", "rows", "slots", "samples", "kept")}
    table["steps"] = len(call.rows)
    return solver_step(SolverStep(*inputs, SolverRow(), *options), channels_last) | {"table": table}


def group_norm(call: GroupNorm, y: Tensor) -> Struct:
    """``kr::GroupNorm`` that writes into ``y``."""
    x, shift, affine = call.x, call.shift, call.weight if call.bias is None else call.bias
    batch, channels, height, width = x.shape
    return {
        "x": x.data_ptr(),
        "skip": address(call.skip),
        "batch": batch,
        "pixels": height * width,
        "x_channels": channels,
        "skip_channels": y.shape[1] - channels,
        "dtype": DTYPES[x.dtype],
        "weight": address(call.weight),
        "bias": address(call.bias),
        "affine_dtype": 0 if affine is None else DTYPES[affine.dtype],
        "shift": address(shift),
        "shift_dtype": 0 if shift is None else DTYPES[shift.dtype],
        "shift_stride": 0 if shift is None else shift.stride(0),
        "groups": call.groups,
        "eps": call.eps,
        "silu": call.silu,
        "y": y.data_ptr(),
    }


def qkv_attention(qkv: Tensor, heads: int, out: Tensor, logsumexp: Tensor | None) -> Struct:
    """``kr::QkvAttention`` that writes into ``out`` and ``logsumexp``."""
    batch, tokens, width = qkv.shape
    return {
        "qkv": qkv.data_ptr(),
        "dtype": DTYPES[qkv.dtype],
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "head_channels": width // 3 // heads,
        "out": out.data_ptr(),
        "logsumexp": address(logsumexp),
    }


def qkv_attention_backward(grad_out: Tensor, qkv: Tensor, heads: int, out, logsumexp, grad_qkv: Tensor) -> Struct:
    """``kr::QkvAttentionBackward`` that writes into ``grad_qkv``."""
    grads = {"grad_out": grad_out.data_ptr(), "grad_qkv": grad_qkv.data_ptr()}
    return qkv_attention(qkv, heads, out, logsumexp) | grads


def group_norm_gradient(
    call: GroupNormGradient,
    out: Tensor,
    skip_out: Tensor | None,
    grad_shift: Tensor | None,
    grad_affine: list[Tensor],
    samples: Tensor | None = None,
    made: Tensor | None = None,
    passed: Tensor | None = None,
) -> tuple[Struct, Struct]:
    """``kr::GroupNorm`` and the ``kr::GroupNormGradient`` that writes into the last ones.

    With ``samples`` nothing is written into ``grad_affine``. ``made`` is the result of a norm with ReLU, which is read.
    """
    norm = GroupNorm(*call[1:6], call.groups, 0.0, call.silu)
    grads = {
        "grad": call.grad.data_ptr(),
        "mean": call.mean.data_ptr(),
        "rstd": call.rstd.data_ptr(),
        "out": out.data_ptr(),
        "skip_out": address(skip_out),
        "grad_shift": address(grad_shift),
        "grad_weight": grad_affine[0].data_ptr(),
        "grad_bias": grad_affine[1].data_ptr(),
        "samples": address(samples),
        "made": address(made),
        "passed": address(passed),
    }
    return group_norm(norm, call.grad) | {"y": 0}, grads


def batch_norm_act(call: BatchNormAct, y: Tensor, mean: Tensor, var: Tensor) -> Struct:
    """``kr::BatchNormAct`` that writes into ``y``, ``mean`` and ``var``."""
    return {
        "x": call.x.data_ptr(),
        "residual": address(call.residual),
        **_rows(call.x),
        "weight": address(call.weight),
        "bias": address(call.bias),
        "eps": call.eps,
        "relu": call.relu,
        "y": y.data_ptr(),
        "mean": mean.data_ptr(),
        "var": var.data_ptr(),
    }


def batch_norm_act_backward(
    call: BatchNormActGradient, out: Tensor, passed: Tensor | None, grad_weight: Tensor, grad_bias: Tensor
) -> Struct:
    """``kr::BatchNormActGradient`` that writes into the last four."""
    return {
        "grad": call.grad.data_ptr(),
        "x": call.x.data_ptr(),
        "y": address(call.y),
        **_rows(call.x),
        "weight": address(call.weight),
        "bias": address(call.bias),
        "mean": call.mean.data_ptr(),
        "var": call.var.data_ptr(),
        "eps": call.eps,
        "relu": call.relu,
        "out": out.data_ptr(),
        "passed": address(passed),
        "grad_weight": grad_weight.data_ptr(),
        "grad_bias": grad_bias.data_ptr(),
    }


def _rows(x: Tensor) -> Struct:
    batch, channels, height, width = x.shape
    return {"rows": batch * height * width, "channels": channels, "dtype": DTYPES[x.dtype]}


def optimizer_table(tensors: OptimizerTensors) -> Tensor:
    """int64 ``[7, N]``: what ``kr::OptimizerStep`` reads of each tensor whenever it steps."""
    numbers = [p.numel() for p in tensors.parameters]
    kinds = tensors.parameters, tensors.first, tensors.second, tensors.steps, tensors.averages
    rows = [numbers, tensors.groups, *([address(each) for each in kind] for kind in kinds)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def optimizer_step(call: OptimizerStep) -> tuple[Struct, list[array.array]]:
    """``kr::OptimizerStep``, and the arrays that it points into."""
    adamw = isinstance(call.rules[0], AdamWRule)
    numbers = [number for rule in call.rules for number in (*rule, *(() if adamw else (0.0,)))]
    grads, groups = array.array("Q", call.addresses), array.array("d", numbers)
    fields = {
        "tensors": len(grads),
        "table": call.table.data_ptr(),
        "grads": grads.buffer_info()[0],
        "groups": groups.buffer_info()[0],
        "adamw": adamw,
        "max_norm": call.max_norm,
        "average_weight": call.average_weight,
    }
    return fields, [grads, groups]


def model_residual_block(call: ModelResidualBlock, y: Tensor) -> Struct:
    """``kr::cuda::ResidualBlock`` that writes into ``y``."""
    models, images, height, width, channels = call.x.shape
    tensors = {name: address(getattr(call, name)) for name in call._fields[:-1]}
    sizes = {"models": models, "images": images, "height": height, "width": width, "channels": channels}
    return tensors | sizes | {"bf16": call.x.dtype == torch.bfloat16, "relu": call.relu, "y": y.data_ptr()}


def membership_signals(logits: Tensor, labels: Tensor, outputs: dict[str, Tensor]) -> Struct:
    """``kr::MembershipSignals`` that writes into ``outputs``, by the names of codes.SIGNALS."""
    rows, classes = logits.shape
    sizes = {"dtype": DTYPES[logits.dtype], "rows": rows, "classes": classes, "stride": logits.stride(0)}
    signals = {name: address(outputs.get(name)) for name in SIGNALS}
    return {"logits": logits.data_ptr(), **sizes, "labels": labels.data_ptr(), **signals}


def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str, scores: Tensor | None):
    """``kr::Lira`` that writes into ``scores``; None where only variances are pooled."""
    method = {"online": online, "variance": VARIANCES.index(variance), "scores": address(scores)}
    return _shadow_values(phi, keep, target) | method


def attack_r(phi: Tensor, keep: Tensor, target: Tensor | None, share: Tensor) -> Struct:
    """``kr::AttackR`` that writes into ``share``."""
    method = {"float64": phi.dtype == torch.float64, "share": share.data_ptr()}
    return _shadow_values(phi, keep, target) | method


def _shadow_values(phi: Tensor, keep: Tensor, target: Tensor | None) -> Struct:
    queries, examples, models = phi.shape
    tensors = {"phi": phi.data_ptr(), "keep": keep.data_ptr(), "target": address(target)}
    targets = models if target is None else target.shape[2]
    return tensors | {"queries": queries, "examples": examples, "models": models, "targets": targets}


def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Struct:
    """``kr::Rmia``."""
    queries = p_x.shape[0] if p_x.ndim == 2 else 1
    sizes = {"queries": queries, "num_x": p_x.shape[-1], "num_z": p_z.shape[-1]}
    rule = {"gamma": gamma, "predicate": PREDICATES.index(predicate)}
    return {"x": p_x.data_ptr(), "z": p_z.data_ptr(), "float64": p_x.dtype == torch.float64, **sizes, **rule}
