"""``optimize(model)``: diffusers' networks with this package's kernels and layout, undone by ``restore()``."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.backends.cpu.nn import winograd_is_faster
from kr_fast.ops.nn.winograd_pack import winograd_pack
from kr_fast.runtime.errors import fail
from kr_fast.synthesis.optimized import fast_blocks, fast_dit

_OP = "optimize"
MOST_TABLE_BYTES = 4 << 30


class Optimized:
    """What :func:`optimize` returns: ``model`` is the patched network, :meth:`restore` takes the patches off.

    As a context manager it restores at the end of the block. ``patched`` counts the replaced forwards by class.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.patched: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Optimized":
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def prepare_steps(self, timesteps: Iterable[float] | Tensor) -> None:
        """Build the conditioning table of ``timesteps``; the model then takes ``step``, an index into them.

        Row ``(step, class)`` of the table holds the time embedding's projection of every block, so a call with
        ``step`` computes no embedding. ``step`` is a 0-dim int64 tensor on the model's device; nothing waits for it.

        Raises: UserError for a model without such a table.
        """
        prepare_steps(self.model, timesteps)

    def restore(self) -> None:
        """Put the original forwards and weight layouts back; outputs are bit-equal to those before. Again: nothing."""
        while self._undo:
            self._undo.pop()()

    def _forward(self, module: nn.Module, function: Callable) -> None:
        if "forward" in vars(module):
            fail(_OP, "model", "have its own forwards (call restore() on an optimized one)", type(module).__name__)
        module.forward = functools.partial(function, module)
        self._undo.append(lambda: delattr(module, "forward"))
        name = type(module).__name__
        self.patched[name] = self.patched.get(name, 0) + 1

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute of ours; a tensor moves with the module but is not saved with it."""
        if isinstance(value, Tensor):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)
        self._undo.append(lambda: delattr(module, name))

    def _channels_last(self, weight: nn.Parameter) -> None:
        stride = weight.stride()
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

        def back() -> None:
            memory = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
            weight.data = memory.copy_(weight.data)

        self._undo.append(back)


@torch.no_grad()
def optimize(model: nn.Module) -> Optimized:
    """Patch a diffusers network in place for fast inference.

    A ``UNet2DModel`` runs channels_last from end to end. Group norm and SiLU are one pass, which also adds the time
    embedding and reads the skip connection in the place of a concatenation (:func:`kr_fast.group_norm_silu`). Heads of
    few channels attend without transposes (:func:`kr_fast.qkv_attention`, on a CPU). The blocks' projections of the
    embedding are one product, computed once a class, or looked up after ``prepare_steps``. Divisions by 1 are left out.
    In float32 on a CPU 3x3 convolutions run by :func:`kr_fast.winograd_conv2d`, whose weights take four times the room.
    In a ``UNet2DConditionModel`` the residual blocks, up-samplers and layouts are patched. A ``DiTTransformer2DModel``
    computes the shifts, scales and gates of its blocks once a class, or looks them up, and q, k and v in one product.

    Outputs differ from the original's by rounding only. Calls need ``torch.no_grad()`` or ``torch.inference_mode()``.
    Some weights are joined when this is called: call ``restore()`` and :func:`optimize` again after changing weights.

    Args:
        model: diffusers' ``UNet2DModel``, ``UNet2DConditionModel`` or ``DiTTransformer2DModel``, float32, bfloat16 or
            float16, on any device.
    Returns: an :class:`Optimized`, whose ``restore()`` undoes everything.
    Raises: UserError naming what was found for another model, block or activation.
    """
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    if not isinstance(model, (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)):
        rule = "be diffusers' UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel"
        fail(_OP, "model", rule, type(model).__name__)
    handle = Optimized(model)
    try:
        if isinstance(model, DiTTransformer2DModel):
            _patch_dit(handle, model)
            return handle
        if isinstance(model, UNet2DModel):
            _check_unet(model)
        _patch_blocks(handle, model, whole=isinstance(model, UNet2DModel))
        if isinstance(model, UNet2DModel):
            _patch_unet(handle, model)
    except BaseException:
        handle.restore()
        raise
    return handle


def _check_unet(model: Any) -> None:
    from diffusers.models.unets import unet_2d_blocks as blocks

    known = (blocks.DownBlock2D, blocks.AttnDownBlock2D, blocks.UpBlock2D, blocks.AttnUpBlock2D)
    for block in [*model.down_blocks, *model.up_blocks]:
        if type(block) not in known:
            fail(_OP, "model", f"have blocks of {', '.join(k.__name__ for k in known)}", type(block).__name__)
    if model.mid_block is not None and type(model.mid_block) is not blocks.UNetMidBlock2D:
        fail(_OP, "model", "have a mid block of UNetMidBlock2D", type(model.mid_block).__name__)
    for module in model.modules():
        why = _resnet_refusal(module) if type(module).__name__.startswith("ResnetBlock") else None
        if why is not None:
            fail(_OP, "model", "have residual blocks of ResnetBlock2D with SiLU and a time embedding", why)


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


def _attends_to_pixels(module: Any) -> bool:
    """An ``Attention`` as UNet2DModel builds it: over pixels, with a group norm, biases and a residual."""
    plain = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return (
        type(module.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
        and module.group_norm is not None
        and module.residual_connection
        and not module.is_cross_attention
        and all(getattr(module, name, None) is None or getattr(module, name) is False for name in plain)
        and all(type(layer) is nn.Linear for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]))
        and module.to_q.weight.shape == module.to_k.weight.shape == module.to_v.weight.shape
    )


def _patch_blocks(handle: Optimized, model: nn.Module, whole: bool) -> None:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets import unet_2d_blocks as blocks
    from diffusers.models.upsampling import Upsample2D

    for module in model.modules():
        kind = type(module)
        if kind is nn.Conv2d:
            handle._channels_last(module.weight)
            plain = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
            if plain and whole and winograd_is_faster(module, module.stride, module.padding):
                handle._set(module, "_kr_fast_winograd", winograd_pack(module.weight))
                handle._forward(module, fast_blocks.conv3x3)
        elif kind is ResnetBlock2D and _resnet_refusal(module) is None:
            handle._forward(module, fast_blocks.resnet)
        elif kind is Upsample2D and module.norm is None and not module.use_conv_transpose and module.interpolate:
            handle._forward(module, fast_blocks.upsample)
        elif whole and kind in (blocks.UpBlock2D, blocks.AttnUpBlock2D):
            handle._forward(module, fast_blocks.up_block)
        elif whole and kind is Attention and _attends_to_pixels(module):
            layers = (module.to_q, module.to_k, module.to_v)
            handle._set(module, "_kr_fast_qkv_weight", torch.cat([layer.weight for layer in layers])[:, :, None, None])
            bias = None if module.to_q.bias is None else torch.cat([layer.bias for layer in layers])
            handle._set(module, "_kr_fast_qkv_bias", bias)
            handle._forward(module, fast_blocks.attention)


def _patch_unet(handle: Optimized, model: Any) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    weights, biases, start = [], [], 0
    for module in model.modules():
        if type(module) is ResnetBlock2D and module.time_emb_proj is not None:
            weights.append(module.time_emb_proj.weight)
            biases.append(module.time_emb_proj.bias)
            stop = start + len(weights[-1])
            handle._set(module, "_kr_fast_columns", (start, stop))
            start = stop
    handle._set(model, "_kr_fast_proj_weight", torch.cat(weights))
    handle._set(model, "_kr_fast_proj_bias", torch.cat(biases))
    _take_steps(handle, model)
    handle._forward(model, fast_blocks.unet)


def _patch_dit(handle: Optimized, model: Any) -> None:
    why = fast_dit.refusal(model)
    if why is not None:
        fail(_OP, "model", "have blocks of self-attention with adaLN-Zero, as DiTTransformer2DModel builds them", why)
    handle._forward(model, fast_dit.dit)
    for module, name, value in fast_dit.joined(model):
        handle._set(module, name, value)
    _take_steps(handle, model)


def _take_steps(handle: Optimized, model: nn.Module) -> None:
    handle._set(model, "_kr_fast_table", None)
    handle._set(model, "prepare_steps", functools.partial(prepare_steps, model))


@torch.no_grad()
def prepare_steps(model: Any, timesteps: Iterable[float] | Tensor) -> None:
    """See :meth:`Optimized.prepare_steps`."""
    if not hasattr(model, "_kr_fast_table"):
        fail("prepare_steps", "model", "be an optimized UNet2DModel or DiTTransformer2DModel", type(model).__name__)
    is_unet = hasattr(model, "class_embedding")
    if is_unet and model.class_embedding is not None and type(model.class_embedding) is not nn.Embedding:
        fail("prepare_steps", "model", "have class embeddings that are a table or none", model.config.class_embed_type)
    if is_unet and model.config.time_embedding_type == "fourier":
        fail("prepare_steps", "model", "not divide by its timestep", "time_embedding_type='fourier'")
    if not isinstance(timesteps, Tensor):
        timesteps = torch.tensor(list(timesteps))
    if timesteps.ndim != 1 or len(timesteps) == 0:
        fail("prepare_steps", "timesteps", "be a sequence of at least one timestep", list(timesteps.shape))
    timesteps = timesteps.to(next(model.parameters()).device)
    make = fast_blocks.all_shifts if is_unet else _dit_rows
    rows = [make(model, timesteps[0])]
    if rows[0].nbytes * len(timesteps) > MOST_TABLE_BYTES:
        size = f"{len(timesteps)} of {rows[0].nbytes} bytes each"
        fail("prepare_steps", "timesteps", f"make a table of at most {MOST_TABLE_BYTES} bytes", size)
    rows += [make(model, t) for t in timesteps[1:]]
    vars(model).pop("_kr_fast_table", None)
    model.register_buffer("_kr_fast_table", torch.stack(rows), persistent=False)


def _dit_rows(model: Any, timestep: Tensor) -> Tensor:
    return fast_dit.all_rows(model, timestep.reshape(1), None)
