"""kr_fast: compiled kernels for Knowledge Recycling.

Every public name and every op of ``torch.ops.kr_fast`` is loaded on first use, so that ``import kr_fast`` imports
neither diffusers, accelerate, triton nor matplotlib.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kr_fast.runtime.version import __version__ as __version__

# Packages that are used by their own names: kr_fast.membership.roc.
_PACKAGES = ("data", "ensemble", "membership", "metrics", "models", "privacy", "recycling", "synthesis")
# Public name -> module that defines it.
_PUBLIC = {
    "RecycleConfig": "kr_fast.recycling.config",
    "recycle": "kr_fast.recycling.pipeline",
    "load_student": "kr_fast.models.student",
    "ModelArray": "kr_fast.ensemble.inference.model_array",
    "audit": "kr_fast.membership.audit.api",
    "membership_signals": "kr_fast.ops.membership.membership_signals",
    "train_shadows": "kr_fast.ensemble.shadows",
    "DistillationLoss": "kr_fast.ops.distillation.distillation_loss",
    "distillation_loss": "kr_fast.ops.distillation.distillation_loss",
    "distillation_loss_and_grad": "kr_fast.ops.distillation.distillation_loss",
    "distillation_loss_topk": "kr_fast.ops.distillation.distillation_loss",
    "distillation_metrics": "kr_fast.ops.distillation.distillation_metrics",
    "dkd_loss": "kr_fast.ops.distillation.dkd_loss",
    "batch_norm_act": "kr_fast.ops.nn.batch_norm_act",
    "group_norm_silu": "kr_fast.ops.nn.group_norm_silu",
    "soft_cross_entropy": "kr_fast.ops.distillation.distillation_loss",
    "LabelPlan": "kr_fast.synthesis.labels",
    "DeviceShards": "kr_fast.synthesis.device",
    "synthesize": "kr_fast.synthesis.pipeline",
    "Sampler": "kr_fast.synthesis.sampler",
    "encode_png": "kr_fast.ops.sampling.encode_png",
    "optimize": "kr_fast.synthesis.optimized.optimize",
    "pack_uint8": "kr_fast.ops.sampling.pack_uint8",
    "philox_normal": "kr_fast.ops.sampling.philox_normal",
    "qkv_attention": "kr_fast.ops.nn.qkv_attention",
    "residual_block": "kr_fast.ops.nn.residual_block",
    "ResidualLayer": "kr_fast.ops.nn.residual_block",
    "solver_step": "kr_fast.ops.sampling.solver_step",
    "direct_conv2d": "kr_fast.ops.nn.direct_conv2d",
    "preactivation_block": "kr_fast.ops.nn.preactivation_block",
    "winograd_conv2d": "kr_fast.ops.nn.winograd_conv2d",
    "winograd_pack": "kr_fast.ops.nn.winograd_pack",
    "conv2d_grad_norms": "kr_fast.ops.privacy.conv2d_grad_norms",
    "conv2d_grad_samples": "kr_fast.ops.privacy.conv2d_grad_samples",
    "embedding_grad_norms": "kr_fast.ops.privacy.embedding_grad_norms",
    "group_norm_grad_norms": "kr_fast.ops.privacy.group_norm_grad_norms",
    "group_norm_grad_samples": "kr_fast.ops.privacy.group_norm_grad_samples",
    "layer_norm_grad_norms": "kr_fast.ops.privacy.layer_norm_grad_norms",
    "layer_norm_grad_samples": "kr_fast.ops.privacy.layer_norm_grad_samples",
    "linear_grad_norms": "kr_fast.ops.privacy.linear_grad_norms",
    "linear_grad_samples": "kr_fast.ops.privacy.linear_grad_samples",
}

if TYPE_CHECKING:  # the same names for editors and type checkers, to which a misspelt one is then an error
    from kr_fast import data as data
    from kr_fast import ensemble as ensemble
    from kr_fast import membership as membership
    from kr_fast import metrics as metrics
    from kr_fast import models as models
    from kr_fast import privacy as privacy
    from kr_fast import recycling as recycling
    from kr_fast import synthesis as synthesis
    from kr_fast.ensemble.inference.model_array import ModelArray as ModelArray
    from kr_fast.ensemble.shadows import train_shadows as train_shadows
    from kr_fast.membership.audit.api import audit as audit
    from kr_fast.models.student import load_student as load_student
    from kr_fast.ops.distillation.distillation_loss import DistillationLoss as DistillationLoss
    from kr_fast.ops.distillation.distillation_loss import distillation_loss as distillation_loss
    from kr_fast.ops.distillation.distillation_loss import distillation_loss_and_grad as distillation_loss_and_grad
    from kr_fast.ops.distillation.distillation_loss import distillation_loss_topk as distillation_loss_topk
    from kr_fast.ops.distillation.distillation_loss import soft_cross_entropy as soft_cross_entropy
    from kr_fast.ops.distillation.distillation_metrics import distillation_metrics as distillation_metrics
    from kr_fast.ops.distillation.dkd_loss import dkd_loss as dkd_loss
    from kr_fast.ops.membership.membership_signals import membership_signals as membership_signals
    from kr_fast.ops.nn.batch_norm_act import batch_norm_act as batch_norm_act
    from kr_fast.ops.nn.direct_conv2d import direct_conv2d as direct_conv2d
    from kr_fast.ops.nn.group_norm_silu import group_norm_silu as group_norm_silu
    from kr_fast.ops.nn.preactivation_block import preactivation_block as preactivation_block
    from kr_fast.ops.nn.qkv_attention import qkv_attention as qkv_attention
    from kr_fast.ops.nn.residual_block import ResidualLayer as ResidualLayer
    from kr_fast.ops.nn.residual_block import residual_block as residual_block
    from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d as winograd_conv2d
    from kr_fast.ops.nn.winograd_pack import winograd_pack as winograd_pack
    from kr_fast.ops.privacy.conv2d_grad_norms import conv2d_grad_norms as conv2d_grad_norms
    from kr_fast.ops.privacy.conv2d_grad_samples import conv2d_grad_samples as conv2d_grad_samples
    from kr_fast.ops.privacy.embedding_grad_norms import embedding_grad_norms as embedding_grad_norms
    from kr_fast.ops.privacy.group_norm_grad_norms import group_norm_grad_norms as group_norm_grad_norms
    from kr_fast.ops.privacy.group_norm_grad_samples import group_norm_grad_samples as group_norm_grad_samples
    from kr_fast.ops.privacy.layer_norm_grad_norms import layer_norm_grad_norms as layer_norm_grad_norms
    from kr_fast.ops.privacy.layer_norm_grad_samples import layer_norm_grad_samples as layer_norm_grad_samples
    from kr_fast.ops.privacy.linear_grad_norms import linear_grad_norms as linear_grad_norms
    from kr_fast.ops.privacy.linear_grad_samples import linear_grad_samples as linear_grad_samples
    from kr_fast.ops.sampling.encode_png import encode_png as encode_png
    from kr_fast.ops.sampling.pack_uint8 import pack_uint8 as pack_uint8
    from kr_fast.ops.sampling.philox_normal import philox_normal as philox_normal
    from kr_fast.ops.sampling.solver_step import solver_step as solver_step
    from kr_fast.recycling.config import RecycleConfig as RecycleConfig
    from kr_fast.recycling.pipeline import recycle as recycle
    from kr_fast.synthesis.device import DeviceShards as DeviceShards
    from kr_fast.synthesis.labels import LabelPlan as LabelPlan
    from kr_fast.synthesis.optimized.optimize import optimize as optimize
    from kr_fast.synthesis.pipeline import synthesize as synthesize
    from kr_fast.synthesis.sampler import Sampler as Sampler
else:
    __all__ = ["__version__", *sorted(_PUBLIC)]

    def __getattr__(name: str) -> object:
        if name in _PACKAGES:
            return importlib.import_module(f"kr_fast.{name}")
        if name in _PUBLIC:
            value = getattr(importlib.import_module(_PUBLIC[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'kr_fast' has no attribute {name!r}")

    def _op(name: str) -> object:
        """``torch.ops.kr_fast.<name>``, whose file under ops/ is imported first: ``torch.export.load`` asks for it."""
        namespace = torch.ops.kr_fast
        registered = type(namespace).__getattr__
        try:
            return registered(namespace, name)
        except AttributeError:
            files = [file for file in Path(__file__).parent.glob("ops/*/[a-z]*.py") if name.startswith(file.stem)]
            if not files:
                raise
        file = max(files, key=lambda file: len(file.stem))
        importlib.import_module(f"kr_fast.ops.{file.parent.name}.{file.stem}")
        return registered(namespace, name)

    torch.ops.kr_fast.__getattr__ = _op  # the namespace is a module: this is asked before its class

    def __dir__() -> list[str]:
        return [*__all__, *_PACKAGES]
