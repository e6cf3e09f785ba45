"""What :func:`kr_fast.optimize` patches of diffusers' UNets, and which of them it takes."""

from typing import Any

import torch
from torch import nn

from kr_fast.backends.cpu.nn import winograd_is_faster
from kr_fast.ops.nn.winograd_pack import winograd_pack
from kr_fast.synthesis.optimized import fast_blocks
from kr_fast.synthesis.optimized.calls import watch
from kr_fast.training.patches import Patches
from kr_fast.training.unet_blocks import attends_to_pixels, fusible, up_block, upsample


def refusal(model: Any) -> tuple[str, str] | None:
    """(rule, what was found) where a ``UNet2DModel`` has a block of another kind."""
    from diffusers.models.unets import unet_2d_blocks as blocks

    known = (blocks.DownBlock2D, blocks.AttnDownBlock2D, blocks.UpBlock2D, blocks.AttnUpBlock2D)
    for block in [*model.down_blocks, *model.up_blocks]:
        if type(block) not in known:
            return f"have blocks of {', '.join(k.__name__ for k in known)}", type(block).__name__
    if model.mid_block is not None and type(model.mid_block) is not blocks.UNetMidBlock2D:
        return "have a mid block of UNetMidBlock2D", type(model.mid_block).__name__
    for module in model.modules():
        why = _resnet_refusal(module) if type(module).__name__.startswith("ResnetBlock") else None
        if why is not None:
            return "have residual blocks of ResnetBlock2D with SiLU and a time embedding", why
        projection = getattr(module, "time_emb_proj", None)
        if type(projection) not in (nn.Linear, type(None)):  # their weights are joined, so an adapter would be lost
            return "have plain linear projections of its time embedding", type(projection).__name__
    return None


def _resnet_refusal(module: Any) -> str | None:
    """Why a residual block cannot be patched."""
    from diffusers.models.resnet import ResnetBlock2D

    if type(module) is not ResnetBlock2D:
        return type(module).__name__
    if not isinstance(module.nonlinearity, nn.SiLU):
        return type(module.nonlinearity).__name__
    if module.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm={module.time_embedding_norm!r}"
    if module.time_emb_proj is None and module.time_embedding_norm == "scale_shift":
        return "scale_shift without a time embedding"
    return None


def _is_plain(conv: nn.Conv2d) -> bool:
    return (conv.groups, conv.dilation, conv.padding_mode) == (1, (1, 1), "zeros") and isinstance(conv.padding, tuple)


def patch_blocks(handle: Patches, model: nn.Module, *, whole: bool, training: bool = False) -> None:
    """Patch the blocks of a UNet; ``whole`` where activations are channels_last from end to end.

    In training weights are joined and transformed at every call, so that they get their gradients.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets import unet_2d_blocks as blocks
    from diffusers.models.upsampling import Upsample2D

    for module in reversed(list(model.modules())):  # inner ones first
        kind = type(module)
        if kind is nn.Conv2d:
            handle.channels_last(module.weight)
            plain = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
            if plain and whole and winograd_is_faster(module, module.stride, module.padding):
                handle.forward(module, fast_blocks.conv3x3)
                if not training:
                    handle.set(module, "_kr_fast_winograd", winograd_pack(module.weight))
            elif training and _is_plain(module):
                handle.forward(module, fast_blocks.conv)
        elif kind is ResnetBlock2D and _resnet_refusal(module) is None:
            handle.forward(module, fast_blocks.resnet)
            watch(handle, module, _fused_into(module, whole, training))
            if training:
                handle.set(module, "_kr_fast_fuses", fusible(module))
        elif kind is Upsample2D and module.norm is None and not module.use_conv_transpose and module.interpolate:
            handle.forward(module, upsample)
        elif whole and kind in (blocks.UpBlock2D, blocks.AttnUpBlock2D):
            handle.forward(module, up_block)
        elif whole and kind is Attention and attends_to_pixels(module):
            handle.forward(module, fast_blocks.attention)
            if not training:
                weight, bias = fast_blocks.join_qkv(module)
                handle.set(module, "_kr_fast_qkv_weight", weight)
                handle.set(module, "_kr_fast_qkv_bias", bias)
            layers = (module.group_norm, module.to_q, module.to_k, module.to_v, *module.to_out)
            watch(handle, module, layers)


def _fused_into(block: Any, whole: bool, training: bool) -> list[Any]:
    """The modules in a residual block that ``fast_blocks.resnet`` does not call."""
    inside = [block.norm1, block.norm2, block.nonlinearity, block.dropout]
    inside += [block.time_emb_proj] if whole else []
    inside += [block.conv_shortcut] if whole and type(block.conv_shortcut) is nn.Conv2d else []
    inside += [block.conv1] if training else []
    return inside + ([block.conv2] if "forward" in vars(block.conv2) else [])


def patch(handle: Patches, model: Any, *, training: bool = False) -> None:
    """Patch a ``UNet2DModel`` as a whole, after its blocks."""
    from diffusers.models.resnet import ResnetBlock2D

    shifted, start = [], 0
    for module in model.modules():
        if type(module) is ResnetBlock2D and module.time_emb_proj is not None:
            shifted.append(module)
            stop = start + len(module.time_emb_proj.weight)
            handle.set(module, "_kr_fast_columns", (start, stop))
            start = stop
    if training:
        handle.set(model, "_kr_fast_shifted", tuple(shifted))
    else:
        weight, bias = fast_blocks.join_projections(shifted)
        handle.set(model, "_kr_fast_proj_weight", weight)
        handle.set(model, "_kr_fast_proj_bias", bias)
    embeddings = [model.time_proj, *model.time_embedding.modules()]
    embeddings += [] if model.class_embedding is None else model.class_embedding.modules()
    watch(handle, model, [model.conv_norm_out, model.conv_act, *embeddings])
    handle.forward(model, fast_blocks.unet)
