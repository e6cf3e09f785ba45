"""A call of every op by its public function, for tests of derivatives and of what torch does around a call."""

from collections.abc import Callable

import torch

from kr_fast.ops.batched.model_batch_norm import model_batch_norm
from kr_fast.ops.batched.model_conv2d import model_conv2d
from kr_fast.ops.batched.model_residual_block import model_residual_block
from kr_fast.ops.distillation.distillation_loss import (
    distillation_loss,
    distillation_loss_topk,
    soft_cross_entropy,
)
from kr_fast.ops.distillation.dkd_loss import dkd_loss
from kr_fast.ops.membership.attack_r import attack_r
from kr_fast.ops.membership.best_threshold import best_threshold
from kr_fast.ops.membership.lira import lira
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.ops.membership.rmia import rmia
from kr_fast.ops.membership.roc import roc
from kr_fast.ops.nn.batch_norm_act import batch_norm_act
from kr_fast.ops.nn.direct_conv2d import direct_conv2d
from kr_fast.ops.nn.group_norm_silu import group_norm_silu
from kr_fast.ops.nn.preactivation_block import preactivation_block
from kr_fast.ops.nn.qkv_attention import qkv_attention
from kr_fast.ops.nn.residual_block import ResidualLayer, residual_block
from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d
from kr_fast.ops.nn.winograd_conv2d_grad_weight import winograd_conv2d_grad_weight
from kr_fast.ops.nn.winograd_pack import winograd_pack
from kr_fast.ops.privacy.conv2d_grad_norms import conv2d_grad_norms
from kr_fast.ops.privacy.conv2d_grad_samples import conv2d_grad_samples
from kr_fast.ops.privacy.embedding_grad_norms import embedding_grad_norms
from kr_fast.ops.privacy.group_norm_grad_norms import group_norm_grad_norms
from kr_fast.ops.privacy.group_norm_grad_samples import group_norm_grad_samples
from kr_fast.ops.privacy.layer_norm_grad_norms import layer_norm_grad_norms
from kr_fast.ops.privacy.layer_norm_grad_samples import layer_norm_grad_samples
from kr_fast.ops.privacy.linear_grad_norms import linear_grad_norms
from kr_fast.ops.privacy.linear_grad_samples import linear_grad_samples
from kr_fast.ops.sampling.solver_step import SolverRow, solver_step

torch.manual_seed(0)
T, Y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 0, 3])
P = T.softmax(1)
VALUES, INDICES = P.topk(2)
KEEP = torch.arange(8).reshape(4, 2) % 3 == 0
KEEP = torch.cat([KEEP, ~KEEP])
ROW = SolverRow(x0_sample=1.1, x0_model=-0.4, clip=9.0, sample=0.5, model=0.2, x0=0.3, noise=0.1)
GEOMETRY = {"stride": 1, "padding": 1}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Name -> (function of float64 tensors, their shapes): all that is in the dispatcher or the registry, by its public
# function, but for what writes into its arguments and what takes no floating-point numbers.
DIFFERENTIABLE: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "distillation_loss": (lambda z: distillation_loss(z, T, temperature=2.0), [(3, 4)]),
    "distillation_loss, hard": (
        lambda z: distillation_loss(z, T, Y, hard_weight=0.5, label_smoothing=0.1, reduction="none"),
        [(3, 4)],
    ),
    "distillation_loss, weights": (
        lambda z: distillation_loss(z, P, target_type="probs", sample_weight=torch.tensor([1.0, 0, 2])),
        [(3, 4)],
    ),
    "distillation_loss, standardize": (
        lambda z: distillation_loss(z, T, Y, hard_weight=0.5, standardize=True),
        [(3, 4)],
    ),
    "soft_cross_entropy": (lambda z: soft_cross_entropy(z, P, temperature=3.0, reduction="sum"), [(3, 4)]),
    "dkd_loss": (lambda z: dkd_loss(z, T, Y, hard_weight=0.2), [(3, 4)]),
    "distillation_loss_topk, smooth": (lambda z: distillation_loss_topk(z, VALUES, INDICES, temperature=2.0), [(3, 4)]),
    "distillation_loss_topk, renorm": (lambda z: distillation_loss_topk(z, VALUES, INDICES, tail="renorm"), [(3, 4)]),
}
ONCE: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "model_conv2d": (lambda x, w, b: model_conv2d(x, w, b, **GEOMETRY), [(1, 2, 3, 3, 2), (1, 2, 3, 3, 2), (1, 2)]),
    "model_batch_norm": (
        lambda x, w, b, r: model_batch_norm(x, w, b, r)[0],
        [(2, 2, 2, 2, 2), (2, 2), (2, 2), (2, 2, 2, 2, 2)],
    ),
    "qkv_attention": (lambda x: qkv_attention(x, 1), [(1, 2, 12)]),
    "batch_norm_act": (
        lambda x, w, b, r: batch_norm_act(last(x), w, b, residual=last(r)),
        [(2, 3, 2, 2), (3,), (3,), (2, 3, 2, 2)],
    ),
    "group_norm_silu": (
        lambda x, skip, shift, w, b: group_norm_silu(last(x), 2, w, b, skip=last(skip), shift=shift),
        [(2, 3, 2, 2), (2, 1, 2, 2), (2, 4), (4,), (4,)],
    ),
    "group_norm_silu, norm alone": (lambda x: group_norm_silu(last(x), 2, None, None, activation=None), [(1, 4, 2, 2)]),
    "batch_norm_act, no residual": (lambda x, w, b: batch_norm_act(last(x), w, b), [(2, 3, 2, 2), (3,), (3,)]),
    "model_batch_norm, relu": (lambda x, r: model_batch_norm(x, residual=r, relu=True)[0], [(2, 2, 1, 2, 2)] * 2),
    "direct_conv2d": (
        lambda x, w, b: direct_conv2d(last(x), w, bias=b, stride=2, padding=1),
        [(1, 2, 3, 2), (2, 2, 3, 3), (2,)],
    ),
    "residual_block": (  # of 16 channels that repeat two
        lambda x, v, w, n, b: residual_block(
            last(x.repeat(1, 8, 1, 1)),
            *(ResidualLayer(each.repeat(8, 8, 1, 1), n.repeat(8), b.repeat(8)) for each in (v, w)),
        ),
        [(2, 2, 2, 2), (2, 2, 3, 3), (2, 2, 3, 3), (2,), (2,)],
    ),
    "preactivation_block": (
        lambda x, s, t, w, b, f: preactivation_block(last(x), [(3, w, b, 1)] * 2, [(f, b)] * 2, skip=last(s), shift=t),
        [(1, 2, 3, 2), (1, 1, 3, 2), (1, 3), (3,), (3,), (3, 3, 3, 3)],
    ),
    "winograd_conv2d, train": (lambda x, w, b: winograd_conv2d(last(x), w, bias=b), [(1, 2, 3, 2), (2, 2, 3, 3), (2,)]),
}
NEVER: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "membership_signals": (lambda z: membership_signals(z, Y, validate_args=False)["phi"], [(3, 4)]),
    "solver_step": (
        lambda x, e: solver_step(x, e, ROW, ids=torch.arange(2), emit=("sample",)),
        [(2, 1, 2, 2), (2, 1, 2, 2)],
    ),
    "solver_step, guidance": (
        lambda x, e, u: solver_step(x, e, ROW, ids=torch.arange(2), uncond_output=u, guidance_scale=2.0),
        [(2, 1, 2, 2)] * 3,
    ),
    "winograd_conv2d": (
        lambda x, w: winograd_conv2d(last(x), w, 2),
        [(1, 2, 4, 4), tuple(winograd_pack(torch.zeros(2, 2, 3, 3)).shape)],
    ),
    "winograd_conv2d_grad_weight": (
        lambda x, g: winograd_conv2d_grad_weight(*(v.contiguous(memory_format=torch.channels_last) for v in (x, g))),
        [(1, 2, 4, 4), (1, 2, 4, 4)],
    ),
    "residual_block_inference": (
        lambda x: residual_block(
            last(x.repeat(1, 8, 1, 1)),
            *[ResidualLayer(x.new_ones(16, 16, 3, 3), None, None, x.new_zeros(16), x.new_ones(16))] * 2,
            training=False,
        ),
        [(2, 2, 2, 2)],
    ),
    "model_residual_block": (
        lambda x, v, w: model_residual_block(x, v, None, w, None),
        [(1, 1, 3, 3, 2), (1, 2, 3, 3, 2), (1, 2, 3, 3, 2)],
    ),
    "conv2d_grad_norms": (lambda x, g: conv2d_grad_norms(x, g, 3, padding=1), [(2, 2, 4, 4), (2, 3, 4, 4)]),
    "conv2d_grad_samples": (lambda x, g: conv2d_grad_samples(x, g, 1)[0], [(2, 2, 4, 4), (2, 3, 4, 4)]),
    "linear_grad_norms": (lambda x, g: linear_grad_norms(x, g, bias=True), [(3, 4), (3, 2)]),
    "linear_grad_samples": (lambda x, g: linear_grad_samples(x, g)[0], [(3, 4), (3, 2)]),
    "embedding_grad_norms": (lambda g: embedding_grad_norms(Y, g), [(3, 4)]),
    "group_norm_grad_norms": (lambda x, g: group_norm_grad_norms(x, g, 2), [(2, 4, 3), (2, 4, 3)]),
    "group_norm_grad_samples": (lambda x, g: group_norm_grad_samples(x, g, 2)[0], [(2, 4, 3), (2, 4, 3)]),
    "layer_norm_grad_norms": (lambda x, g: layer_norm_grad_norms(x, g, 4), [(3, 4), (3, 4)]),
    "layer_norm_grad_samples": (lambda x, g: layer_norm_grad_samples(x, g, 4)[0], [(3, 4), (3, 4)]),
    "lira": (lambda phi: lira(phi, KEEP, variance="fixed")[0], [(1, 2, 8)]),
    "attack_r": (lambda phi: attack_r(phi, KEEP), [(1, 2, 8)]),
    "rmia": (lambda x, z: rmia(x.exp(), z.exp())[0], [(3,), (4,)]),
    "best_threshold": (lambda values: best_threshold(values, KEEP), [(8, 2)]),
    "roc": (lambda scores: roc(scores, torch.tensor([True, False, True]))[0], [(3,)]),
}
CASES = {**DIFFERENTIABLE, **ONCE, **NEVER}
STATISTICS = {"lira", "attack_r", "rmia", "best_threshold", "roc"}  # not in the dispatcher


def inputs(name: str, grad: bool = True) -> list[torch.Tensor]:
    """Those of a case, drawn from a fixed seed."""
    torch.manual_seed(1)
    return [randn(*shape).requires_grad_(grad) for shape in CASES[name][1]]
