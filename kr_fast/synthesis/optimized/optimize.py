"""``optimize(model)``: diffusers' networks with this package's kernels and layout, undone by ``restore()``."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.runtime.errors import fail
from kr_fast.synthesis.optimized import fast_blocks, fast_dit, unets
from kr_fast.synthesis.optimized.calls import watch
from kr_fast.synthesis.optimized.training import optimize_training
from kr_fast.training.patches import Patches

_OP = "optimize"
MOST_TABLE_BYTES = 4 << 30


class Optimized(Patches):
    """What :func:`optimize` returns: ``model`` is the patched network, :meth:`restore` takes the patches off.

    As a context manager it restores at the end of the block. ``patched`` counts the replaced forwards by class.
    """

    def prepare_steps(self, timesteps: Iterable[float] | Tensor) -> None:
        """Build the conditioning table of ``timesteps``; the model then takes ``step``, an index into them.

        Row ``(step, class)`` of the table holds the time embedding's projection of every block, so a call with
        ``step`` computes no embedding. ``step`` is a 0-dim int64 tensor on the model's device; nothing waits for it.

        Raises: UserError for a model without such a table.
        """
        prepare_steps(self.model, timesteps)


@torch.no_grad()
def optimize(model: nn.Module, *, training: bool = False) -> Optimized:
    """Patch a network in place for fast inference, or for fast training.

    **Inference.** A ``UNet2DModel`` runs channels_last from end to end. Group norm and SiLU are one pass, which also
    adds the time embedding and reads the skip connection in the place of a concatenation
    (:func:`kr_fast.group_norm_silu`). Heads of few channels attend without transposes (:func:`kr_fast.qkv_attention`,
    on a CPU). The blocks' projections of the embedding are one product, computed once a class, or looked up after
    ``prepare_steps``. Divisions by 1 are left out. In float32 on a CPU 3x3 convolutions run by
    :func:`kr_fast.winograd_conv2d`, whose weights take four times the room. In a ``UNet2DConditionModel`` the residual
    blocks, up-samplers and layouts are patched. A ``DiTTransformer2DModel`` computes the shifts, scales and gates of
    its blocks once a class, or looks them up, and q, k and v in one product. Calls need ``torch.no_grad()`` or
    ``torch.inference_mode()``. Some weights are joined when this is called: call ``restore()`` and :func:`optimize`
    again after changing weights. Hooks on modules that are fused into others are refused, here or at the next call.

    **Training**, in float32 on a CPU. Convolutions, their gradients, group norm and attention run by the same
    ops, a UNet's residual blocks whole (:func:`kr_fast.preactivation_block`);
    ``BatchNorm2d``, the residual sum and ReLU are one (:func:`kr_fast.batch_norm_act`). It takes this package's
    ResNets, torchvision's ``ResNet``, ``UNet2DModel``, ``DiTTransformer2DModel`` (its attention and products), and the
    convolutions and norms of any other network; what it cannot take stays as it is, and the logger says so once.
    Weights stay the model's own parameters. In eval mode the model computes as before. With glibc the process from then
    on keeps what it frees, up to 2 GiB, instead of taking every activation from the system again; environment variables
    ``MALLOC_...`` and ``GLIBC_TUNABLES`` of the user's come first.

    Outputs and gradients differ from the original's by rounding only.

    Args:
        model: for inference diffusers' ``UNet2DModel``, ``UNet2DConditionModel`` or ``DiTTransformer2DModel``, float32,
            bfloat16 or float16, on any device; for training any module.
        training: whether the model is to be trained.
    Returns: an :class:`Optimized`, whose ``restore()`` undoes everything.
    Raises: UserError naming what was found for another model, block or activation, or the module that has a hook
        (inference).
    """
    if training:
        return optimize_training(Optimized(model))
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    if not isinstance(model, (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)):
        rule = "be diffusers' UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel"
        fail(_OP, "model", rule, type(model).__name__)
    handle = Optimized(model)
    try:
        if isinstance(model, DiTTransformer2DModel):
            _patch_dit(handle, model)
            return handle
        if isinstance(model, UNet2DModel) and (why := unets.refusal(model)) is not None:
            fail(_OP, "model", *why)
        unets.patch_blocks(handle, model, whole=isinstance(model, UNet2DModel))
        if isinstance(model, UNet2DModel):
            unets.patch(handle, model)
            _take_steps(handle, model)
    except BaseException:
        handle.restore()
        raise
    return handle


def _patch_dit(handle: Optimized, model: Any) -> None:
    why = fast_dit.refusal(model)
    if why is not None:
        fail(_OP, "model", "have blocks of self-attention with adaLN-Zero, as DiTTransformer2DModel builds them", why)
    handle.forward(model, fast_dit.dit)
    called = {model, *model.pos_embed.modules(), *model.proj_out_2.modules()}
    watch(handle, model, (each for each in model.modules() if each not in called))
    for module, name, value in fast_dit.joined(model):
        handle.set(module, name, value)
    _take_steps(handle, model)


def _take_steps(handle: Optimized, model: nn.Module) -> None:
    handle.set(model, "_kr_fast_table", None)
    handle.set(model, "_kr_fast_timesteps", None)  # of a table that a sampler made
    handle.set(model, "prepare_steps", functools.partial(prepare_steps, model))


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
    model._kr_fast_timesteps = None
    vars(model).pop("_kr_fast_table", None)
    model.register_buffer("_kr_fast_table", torch.stack(rows), persistent=False)


def _dit_rows(model: Any, timestep: Tensor) -> Tensor:
    return fast_dit.all_rows(model, timestep.reshape(1), None)
