"""kr_fast: compiled kernels for Knowledge Recycling.

Every public name is loaded on first use, so that ``import kr_fast`` imports neither diffusers, accelerate, triton nor
matplotlib.
"""

import importlib

from kr_fast.runtime.version import __version__

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
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name == "membership":  # the one package that is used by its own name
        return importlib.import_module("kr_fast.membership")
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kr_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
