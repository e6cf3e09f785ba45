"""``optimize(model, training=True)``: what it patches of each kind of network."""

from typing import Any

from torch import nn

from kr_fast.runtime.errors import fail
from kr_fast.runtime.memory import keep_freed_memory
from kr_fast.synthesis.optimized import fast_blocks, fast_dit, unets
from kr_fast.synthesis.optimized.calls import watch
from kr_fast.training.classifiers import hooked
from kr_fast.training.fused import fused, tell, unsupported
from kr_fast.training.patches import Patches
from kr_fast.training.unet_blocks import attends_to_pixels


def optimize_training(handle: Patches) -> Patches:
    """Patch ``handle.model`` for training; a network that is not taken stays as it is, which the logger says once."""
    model = handle.model
    if not isinstance(model, nn.Module):
        fail("optimize", "model", "be a torch module", type(model).__name__)
    try:
        if not type(model).__module__.startswith("diffusers."):
            return fused(model, handle)
        why = unsupported(model)
        why = _patch(handle, model) if why is None else why
        if why is None:
            keep_freed_memory()
        tell(handle, why)
    except BaseException:
        handle.restore()
        raise
    return handle


def _patch(handle: Patches, model: Any) -> str | None:
    """Patch; or why not."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "it checkpoints gradients"
    if any(hooked(module) for module in model.modules() if module is not model):
        return "modules in it have hooks"
    if isinstance(model, UNet2DModel):
        return _patch_unet(handle, model)
    if isinstance(model, DiTTransformer2DModel):
        return _patch_dit(handle, model)
    return "it is neither a UNet2DModel nor a DiTTransformer2DModel"


def _patch_unet(handle: Patches, model: Any) -> str | None:
    why = unets.refusal(model)
    if why is not None:
        return f"it must {why[0]}, has {why[1]}"
    if any(attends_to_pixels(module) and module.to_out[1].p for module in model.modules() if _attends(module)):
        return "its attention has dropout"
    unets.patch_blocks(handle, model, whole=True, training=True)
    unets.patch(handle, model, training=True)
    return None


def _attends(module: nn.Module) -> bool:
    from diffusers.models.attention_processor import Attention

    return type(module) is Attention


def _patch_dit(handle: Patches, model: Any) -> str | None:
    why = fast_dit.refusal(model)
    if why is not None:
        return f"it has {why}"
    for block in model.transformer_blocks:
        attention = block.attn1
        handle.forward(attention, fast_dit.attention_alone)
        watch(handle, attention, (attention.to_q, attention.to_k, attention.to_v, *attention.to_out))
        for module in (*attention.to_out.modules(), *block.ff.modules()):
            if type(module) is nn.Linear:
                handle.forward(module, fast_dit.product)
    if type(model.pos_embed.proj) is nn.Conv2d:
        handle.forward(model.pos_embed.proj, fast_blocks.conv)
    return None
