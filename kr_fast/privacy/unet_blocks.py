"""Blocks of diffusers' UNets in a private step, in channels_last and by this package's kernels where these fit."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kr_fast.ops.nn.preactivation_block  # noqa: F401  (registers the op)
from kr_fast.backends import registry
from kr_fast.backends.arguments import PreactivationBlock
from kr_fast.backends.calls import AttentionCall, Call
from kr_fast.backends.cpu.nn import winograd_trains_faster
from kr_fast.privacy.layers import Conv2d, Layer, Linear
from kr_fast.privacy.norms import GroupNorm
from kr_fast.training import unet_blocks
from kr_fast.training.conditions import hooked, plain
from kr_fast.training.layout import nhwc
from kr_fast.training.patches import Patches

Layers = dict[int, Layer]  # by the id of the module


def fuse(patches: Patches, model: nn.Module, layers: Iterable[Layer]) -> None:
    """Patch the blocks of UNets in ``model`` that hold ``layers``."""
    by_module = {id(layer.module): layer for layer in layers}
    for module in reversed(list(model.modules())):  # what is inside of a block before the block
        kind = f"{type(module).__module__}.{type(module).__qualname__}"  # diffusers is not imported
        patch = _PATCHES.get(kind)
        if patch is not None and "forward" not in vars(module):
            patch(patches, module, by_module)


# ------------------------------------------------------------ residual blocks


def _patch_resnet(patches: Patches, block: Any, layers: Layers) -> None:
    norms = tuple(layers.get(id(each)) for each in (block.norm1, block.norm2))
    if all(isinstance(each, GroupNorm) for each in norms) and unet_blocks.preactivates(block):
        whole = _Whole.of(block, layers) if unet_blocks.fusible(block) else None
        patches.forward(block, functools.partial(_resnet, norms, whole))


def _resnet(
    norms: tuple[GroupNorm, GroupNorm],
    whole: "_Whole | None",
    block: Any,
    input_tensor: Tensor,
    temb: Any = None,
    *_: Any,
    skip: Tensor | None = None,
    **__: Any,
) -> Tensor:
    """``ResnetBlock2D``; with ``skip``, of ``cat([input_tensor, skip], 1)``."""
    x, skip = nhwc(input_tensor), None if skip is None else nhwc(skip)
    shift = None
    if block.time_emb_proj is not None and temb is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    if whole is not None and whole.takes(x, skip):
        return whole(x, skip, shift)
    x = x if skip is None else torch.cat([x, skip], 1)
    h = block.conv1(_norm_silu(norms[0], block.norm1, x))
    h = block.conv2(block.dropout(_norm_silu(norms[1], block.norm2, h, shift)))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu(layer: GroupNorm, norm: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
    if layer.fuses(x) and not hooked(norm):
        return layer.on_images(nhwc(x), shift=shift, silu=True)
    return F.silu(norm(x if shift is None else x + shift[:, :, None, None]))


class _Whole:
    """A residual block by one op forward and one for its signals backward, ``preactivation_block``."""

    def __init__(self, block: Any, norms: list[GroupNorm], convolutions: list[Conv2d]):
        self.block, self.norms, self.convolutions = block, norms, convolutions

    @classmethod
    def of(cls, block: Any, layers: Layers) -> "_Whole | None":
        """None where a layer of the block is not trained."""
        modules = [block.norm1, block.norm2, block.conv1, block.conv2]
        found = [
            layers.get(id(each)) for each in [*modules, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
        ]
        return None if None in found else cls(block, found[:2], found[2:])

    def takes(self, x: Tensor, skip: Tensor | None) -> bool:
        """Whether the op computes the block on ``x``, and faster than its layers do."""
        block, outputs = self.block, self.block.conv2.out_channels
        channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        inside = (each for each in block.modules() if each is not block and each is not block.time_emb_proj)
        return (
            plain(x)
            and not (block.training and block.dropout.p > 0)
            and winograd_trains_faster((len(x), channels, *x.shape[2:]), outputs)
            and winograd_trains_faster((len(x), outputs, *x.shape[2:]), outputs)
            and registry.runs_preferred("preactivation_block", Call("cpu", torch.float32))
            and not hooked(*inside)
        )

    def __call__(self, x: Tensor, skip: Tensor | None, shift: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return _Block.apply(self, self.norms[0].anchor, x, skip, shift)
        return self.run(x, skip, shift)[0]

    def arguments(self, x: Tensor, skip: Tensor | None, shift: Tensor | None) -> PreactivationBlock:
        """Of the op."""
        (norm1, norm2), (conv1, conv2, *shortcut) = (
            [layer.module for layer in layers] for layers in (self.norms, self.convolutions)
        )
        affine = [parameter for each in (norm1, conv1, norm2, conv2) for parameter in (each.weight, each.bias)]
        last = (shortcut[0].weight, shortcut[0].bias) if shortcut else (None, None)
        groups, eps = [norm1.num_groups, norm2.num_groups], [norm1.eps, norm2.eps]
        return PreactivationBlock(x, skip, shift, *affine, *last, groups, eps)

    def run(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """y, what the 3x3 convolutions read, the result of the first, and the norms' statistics."""
        return torch.ops.kr_fast.preactivation_block(*self.arguments(*inputs))

    def backward(self, grad: Tensor, inputs: list[Tensor | None], state: list[Tensor]) -> list[Tensor | None]:
        """Gradients by x, skip and shift; each layer keeps what it needs."""
        (x, skip, shift), (first, second, convolved, statistics) = inputs, state
        (norm1, norm2), (conv1, conv2, *shortcut) = self.norms, self.convolutions
        sizes = [(len(x), norm.module.num_groups) for norm in self.norms for _ in range(2)]
        each = statistics.split([n * groups for n, groups in sizes])
        mean1, rstd1, mean2, rstd2 = (part.view(size) for part, size in zip(each, sizes, strict=True))
        conv2.record(grad, second)
        kept2, kept1 = (convolved, None, shift, mean2, rstd2), (x, skip, None, mean1, rstd1)
        by_convolved, _, by_shift = norm2.fused_backward(conv2.signal(grad, second), kept2, True)
        conv1.record(by_convolved, first)
        by_x, by_skip, _ = norm1.fused_backward(conv1.signal(by_convolved, first), kept1, True)
        around = grad
        if shortcut:
            u = x if skip is None else nhwc(torch.cat([x, skip], 1))
            shortcut[0].record(grad, u)
            around = shortcut[0].signal(grad, u)
        by_x.add_(around[:, : x.shape[1]])
        if by_skip is not None:
            by_skip.add_(around[:, x.shape[1] :])
        return [by_x, by_skip, by_shift]


class _Block(torch.autograd.Function):
    """A call of a whole residual block."""

    @staticmethod
    def forward(ctx: Any, whole: _Whole, anchor: Tensor, *inputs: Tensor | None) -> Tensor:
        y, *state = whole.run(*inputs)
        ctx.whole = whole
        ctx.save_for_backward(*inputs, *state)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return None, None, *ctx.whole.backward(nhwc(grad), kept[:3], kept[3:])


# ------------------------------------------------------------ attention


def _patch_attention(patches: Patches, module: Any, layers: Layers) -> None:
    if not unet_blocks.attends_to_pixels(module):
        return
    norm = layers.get(id(module.group_norm))
    products = [layers.get(id(each)) for each in (module.to_q, module.to_k, module.to_v)]
    whole = {"weight"} if module.to_q.bias is None else {"weight", "bias"}
    if isinstance(norm, GroupNorm) and all(each is not None and each.trained == whole for each in products):
        patches.forward(module, functools.partial(_attention, norm, products))


def _attention(norm: GroupNorm, products: list[Linear], module: Any, hidden_states: Tensor, *given: Any, **more: Any):
    """``Attention`` over pixels."""
    x = hidden_states
    heads = AttentionCall(x.device.type, x.dtype, module.to_q.out_features // module.heads)
    watched = hooked(module.group_norm, module.to_q, module.to_k, module.to_v)
    alone = not given and all(each is None for name, each in more.items() if name != "temb")
    if x.ndim != 4 or watched or not alone or not norm.fuses(x) or not registry.runs_preferred("qkv_attention", heads):
        return type(module).forward(module, x, *given, **more)
    x = nhwc(x)
    n, c, h, w = x.shape
    tokens = norm.on_images(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
    qkv = _Joined.apply(products, products[0].anchor, tokens) if torch.is_grad_enabled() else _joined(products, tokens)
    y = module.to_out[1](module.to_out[0](torch.ops.kr_fast.qkv_attention_forward(qkv, module.heads)[0]))
    y = y.view(n, h, w, c).permute(0, 3, 1, 2) + x
    return y if module.rescale_output_factor == 1 else y / module.rescale_output_factor


def _weight(products: list[Linear]) -> Tensor:
    return torch.cat([each.module.weight for each in products])


def _joined(products: list[Linear], x: Tensor) -> Tensor:
    bias = products[0].module.bias
    return F.linear(x, _weight(products), None if bias is None else torch.cat([each.module.bias for each in products]))


class _Joined(torch.autograd.Function):
    """Linear layers of one input as one product, whose per-sample gradients are kept."""

    @staticmethod
    def forward(ctx: Any, products: list[Linear], anchor: Tensor, x: Tensor) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x)
        return _joined(products, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        (x,), products = ctx.saved_tensors, ctx.products
        parts = grad.chunk(len(products), -1)
        if all(each.keeps_samples(part, x) for each, part in zip(products, parts, strict=True)):
            first = products[0]
            found, norms = first.measured(grad, x)
            samples = zip(*(each.chunk(len(products), 1) for _, each in found), strict=True)
            for layer, own in zip(products, samples, strict=True):
                layer.check(x)
                layer.keep(list(zip(("weight", "bias"), own, strict=False)), norms)
                norms = None if norms is None else torch.zeros_like(norms)  # of all three at the first
        else:
            for layer, part in zip(products, parts, strict=True):
                layer.record(part.contiguous(), x)
        return None, None, grad @ _weight(products)


# ------------------------------------------------------------ what is around them


def _patch_upsample(patches: Patches, module: Any, layers: Layers) -> None:
    if module.norm is None and not module.use_conv_transpose and module.interpolate:
        patches.forward(module, unet_blocks.upsample)


def _patch_up_block(patches: Patches, module: Any, layers: Layers) -> None:
    ours = all("forward" in vars(each) for each in module.resnets)  # which take skip connections as they are
    if ours and not getattr(module, "gradient_checkpointing", False) and not hooked(*module.resnets):
        patches.forward(module, unet_blocks.up_block)


_PATCHES = {
    "diffusers.models.resnet.ResnetBlock2D": _patch_resnet,
    "diffusers.models.upsampling.Upsample2D": _patch_upsample,
    "diffusers.models.attention_processor.Attention": _patch_attention,
    "diffusers.models.unets.unet_2d_blocks.UpBlock2D": _patch_up_block,
    "diffusers.models.unets.unet_2d_blocks.AttnUpBlock2D": _patch_up_block,
}
