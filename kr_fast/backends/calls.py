"""What decides where an op runs and whether a backend takes it: one small type per op, read by ``refuses(call)``.

The defaults stand for a call of which only the device and the dtype are known, as in the table of ``kr-fast info``.
"""

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """Of most ops: the device type and the dtype of the tensors."""

    device: str
    dtype: torch.dtype


class ClassesCall(NamedTuple):
    """Of distillation_loss, distillation_metrics and membership_signals, whose kernels depend on the class count."""

    device: str
    dtype: torch.dtype
    classes: int = 0


class GroupNormCall(NamedTuple):
    """Of group_norm_silu; ``trains`` where a gradient will be asked for, ``size`` channels in a group."""

    device: str
    dtype: torch.dtype
    trains: bool = False
    size: int = 0


class AttentionCall(NamedTuple):
    """Of qkv_attention."""

    device: str
    dtype: torch.dtype
    head_channels: int | None = None


class ConvCall(NamedTuple):
    """Of model_conv2d and model_conv2d_backward; ``kind`` is "dense", "depthwise" or "grouped"."""

    device: str
    dtype: torch.dtype
    kind: str = "dense"


class ResidualBlockCall(NamedTuple):
    """Of model_residual_block; 0 channels where the block is not known."""

    device: str
    dtype: torch.dtype
    channels: int = 0
    height: int = 0
    width: int = 0


class LiraCall(NamedTuple):
    """Of lira, with the number of shadow models."""

    device: str
    dtype: torch.dtype
    models: int = 0


OF_OP = {
    "distillation_loss": ClassesCall,
    "distillation_metrics": ClassesCall,
    "membership_signals": ClassesCall,
    "group_norm_silu": GroupNormCall,
    "qkv_attention": AttentionCall,
    "model_conv2d": ConvCall,
    "model_conv2d_backward": ConvCall,
    "model_residual_block": ResidualBlockCall,
    "lira": LiraCall,
}


def call_of(op: str, device: str, dtype: torch.dtype) -> Call:
    """A call of ``op`` of which no more is known."""
    return OF_OP.get(op, Call)(device, dtype)
