"""Residual blocks of diffusers' UNets in a private step: group norm, time embedding and SiLU in one pass."""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.privacy.layers import Layer
from kr_fast.privacy.norms import GroupNorm
from kr_fast.training.conditions import hooked
from kr_fast.training.layout import nhwc
from kr_fast.training.patches import Patches


def fuse(patches: Patches, model: nn.Module, layers: list[Layer]) -> None:
    """Patch the ``ResnetBlock2D`` of ``model`` whose group norms are among ``layers``."""
    norms = {id(layer.module): layer for layer in layers if isinstance(layer, GroupNorm)}
    for block in model.modules():
        kind = f"{type(block).__module__}.{type(block).__qualname__}"  # diffusers is not imported
        if kind == "diffusers.models.resnet.ResnetBlock2D" and "forward" not in vars(block) and _fits(block):
            both = norms.get(id(block.norm1)), norms.get(id(block.norm2))
            if None not in both:
                patches.forward(block, functools.partial(_resnet_of, both))


def _fits(block: Any) -> bool:
    return (
        block.upsample is block.downsample is None
        and block.time_embedding_norm == "default"
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _resnet_of(
    norms: tuple[GroupNorm, GroupNorm], block: Any, input_tensor: Tensor, temb: Any = None, **_: Any
) -> Tensor:
    """``ResnetBlock2D``."""
    x = nhwc(input_tensor)
    shift = None
    if block.time_emb_proj is not None and temb is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    h = block.conv1(_norm_silu(norms[0], block.norm1, x))
    h = block.conv2(block.dropout(_norm_silu(norms[1], block.norm2, h, shift)))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu(layer: GroupNorm, norm: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
    if layer.fuses(x) and not hooked(norm):
        return layer.on_images(nhwc(x), shift=shift, silu=True)
    return F.silu(norm(x if shift is None else x + shift[:, :, None, None]))
