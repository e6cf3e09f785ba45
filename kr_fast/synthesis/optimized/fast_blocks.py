"""The forwards that :func:`kr_fast.optimize` puts in the place of diffusers' own, block by block.

Each takes the module whose forward it replaces and is called as that is; activations are channels_last throughout.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.backends.cpu.nn import direct_trains, winograd_trains_faster
from kr_fast.ops.nn.direct_conv2d import direct_conv2d
from kr_fast.ops.nn.group_norm_silu import group_norm_silu
from kr_fast.ops.nn.preactivation_block import unchecked as preactivation_block
from kr_fast.ops.nn.winograd_conv2d import winograd_conv2d
from kr_fast.runtime.errors import fail
from kr_fast.synthesis.optimized.calls import check_call, check_hooks
from kr_fast.training.conditions import plain
from kr_fast.training.layout import nhwc
from kr_fast.training.unet_blocks import attend


class Shifts(NamedTuple):
    """All blocks' projections of the embedding, ``[N, sum of channels]``, in the place of the embedding itself."""

    rows: Tensor


def norm(module: nn.GroupNorm, x: Tensor, activation: str | None = "silu", **more: Any) -> Tensor:
    if x.numel() == module.num_groups and torch.is_grad_enabled() and more.get("skip") is None:
        fail("optimize", "sample", "have more than 1 value per channel of a group in training", list(x.shape))
    return group_norm_silu(
        x, module.num_groups, module.weight, module.bias, eps=module.eps, activation=activation, **more
    )


# A product of winograd_conv2d takes 14 tiles of 4x4 pixels at a time, full or not.
FEWEST_TILES = 28


def conv3x3(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """A 3x3 ``Conv2d`` of stride 1 and padding 1, plus ``residual``; in float32 on a CPU by Winograd's algorithm."""
    n, _, h, w = input.shape
    packed = getattr(self, "_kr_fast_winograd", None)  # follows the module to other devices and dtypes
    weight = self.weight if packed is None else packed
    fast = n * -(-h // 4) * -(-w // 4) >= FEWEST_TILES and plain(input) and weight.dtype == torch.float32
    if fast and packed is not None:
        residual = None if residual is None else nhwc(residual)
        return winograd_conv2d(nhwc(input), packed, self.out_channels, bias=self.bias, residual=residual)
    if fast and winograd_trains_faster(input.shape, self.out_channels):  # the sum is an op of its own in training
        y = winograd_conv2d(nhwc(input), weight, bias=self.bias)
    else:
        y = convolve(input, self.weight, self.bias, self.stride, self.padding)
    return y if residual is None else y.add_(residual)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """A convolution that Winograd's algorithm does not take; in training by this package's sums.

    These are faster for small images and have the same bits for any number of threads, as the library's have not.
    """
    if torch.is_grad_enabled() and plain(x) and weight.dtype == torch.float32 and direct_trains():
        return direct_conv2d(nhwc(x), weight, bias=bias, stride=stride, padding=padding)
    return nhwc(F.conv2d(x, weight, bias, stride, padding))


def conv(self: Any, input: Tensor) -> Tensor:
    """Any other plain ``Conv2d``."""
    return convolve(input, self.weight, self.bias, self.stride, self.padding)


def resnet(self: Any, input_tensor: Tensor, temb: Any = None, *args: Any, skip: Tensor | None = None, **kwargs: Any):
    """``ResnetBlock2D``; with ``skip``, of ``cat([input_tensor, skip], 1)``, which is not stored."""
    check_hooks(self)
    x = nhwc(input_tensor)
    skip = None if skip is None else nhwc(skip)
    if getattr(self, "_kr_fast_fuses", False) and torch.is_grad_enabled() and _fuses(self, x, skip, temb):
        return fused_resnet(self, x, skip, temb)
    h = norm(self.norm1, x, skip=skip)
    for resample in (self.upsample, self.downsample):
        if resample is not None:
            x, h = nhwc(resample(x)), nhwc(resample(h))
    h = nhwc(self.conv1(h))
    shift = None
    if self.time_emb_proj is not None and temb is not None:
        if isinstance(temb, Shifts):
            shift = temb.rows[:, slice(*self._kr_fast_columns)]
        else:
            shift = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
    if self.time_embedding_norm == "scale_shift":
        scale, shift = (part[:, :, None, None] for part in shift.chunk(2, dim=1))
        h = F.silu(torch.addcmul(shift, norm(self.norm2, h, activation=None), 1 + scale))
    else:
        h = norm(self.norm2, h, shift=shift)
    if self.training and self.dropout.p > 0:
        h = self.dropout(h)
    if self.conv_shortcut is None:
        other = x if skip is None else torch.cat([x, skip], 1)
    elif skip is None or type(self.conv_shortcut) is not nn.Conv2d:  # of an adapter, whose weight is not all of it
        other = self.conv_shortcut(x if skip is None else torch.cat([x, skip], 1))
    else:
        weight, bias = self.conv_shortcut.weight, self.conv_shortcut.bias
        other = F.conv2d(x, nhwc(weight[:, : x.shape[1]]), bias)
        other.add_(F.conv2d(skip, nhwc(weight[:, x.shape[1] :])))
    if "forward" in vars(self.conv2):
        h = conv3x3(self.conv2, h, other)
    else:
        h = nhwc(self.conv2(h)).add_(other)
    return h if self.output_scale_factor == 1 else h.div_(self.output_scale_factor)


def _fuses(self: Any, x: Tensor, skip: Tensor | None, temb: Any) -> bool:
    """Whether this call of a fusible block is one of ``preactivation_block``, and faster so."""
    outputs = self.conv2.out_channels
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return (
        plain(x)
        and self.conv1.weight.dtype == torch.float32
        and not (self.training and self.dropout.p > 0)
        and (temb is None or isinstance(temb, Shifts))
        and winograd_trains_faster((len(x), channels, *x.shape[2:]), outputs)
        and winograd_trains_faster((len(x), outputs, *x.shape[2:]), outputs)
    )


def fused_resnet(self: Any, x: Tensor, skip: Tensor | None, temb: Any) -> Tensor:
    """:func:`resnet` as one op, forward and backward."""
    shift = temb.rows[:, slice(*self._kr_fast_columns)] if temb is not None and self.time_emb_proj is not None else None
    layers = [
        parameter for each in (self.norm1, self.conv1, self.norm2, self.conv2) for parameter in (each.weight, each.bias)
    ]
    shortcut = (None, None) if self.conv_shortcut is None else (self.conv_shortcut.weight, self.conv_shortcut.bias)
    groups, eps = [self.norm1.num_groups, self.norm2.num_groups], [self.norm1.eps, self.norm2.eps]
    return preactivation_block(x, skip, shift, *layers, *shortcut, groups, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of ``[N, T, K]``; in float32 on a CPU as a 1x1 convolution.

    oneDNN's convolutions use AVX-512 on every CPU that has it; MKL's products in float32 do not. In training it is this
    package's, whose gradients have the same bits for any number of threads.
    """
    n, t, k = x.shape
    if x.device.type != "cpu" or x.dtype != torch.float32 or n < 2 or t < 2:
        return F.linear(x, weight, bias)
    pixels = x.contiguous().as_strided((n, k, t, 1), (t * k, 1, k, k))
    return convolve(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(n, t, -1)


def join_qkv(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight ``[outputs, inputs, 1, 1]`` and bias of one projection to q, k and v."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers])[:, :, None, None], bias


def _qkv(self: Any) -> tuple[Tensor, Tensor | None]:
    """The joined weights, made once for inference and at every call in training."""
    made = hasattr(self, "_kr_fast_qkv_weight")
    return (self._kr_fast_qkv_weight, self._kr_fast_qkv_bias) if made else join_qkv(self)


def attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Self-attention over pixels: ``Attention`` with a group norm and a residual, as UNets without text have it."""
    check_hooks(self)
    x = nhwc(hidden_states)
    n, c, h, w = x.shape
    weight, bias = _qkv(self)
    if x.device.type == "cpu":  # oneDNN's convolutions know AVX-512 on every CPU that has it; MKL's products do not
        qkv = convolve(norm(self.group_norm, x, activation=None), weight, bias)
        tokens = attend(qkv.permute(0, 2, 3, 1).reshape(n, h * w, -1), self.heads)
        out = self.to_out[0]
        y = convolve(tokens.view(n, h, w, -1).permute(0, 3, 1, 2), out.weight[:, :, None, None], out.bias)
    else:
        tokens = norm(self.group_norm, x, activation=None).permute(0, 2, 3, 1).view(n, h * w, c)
        qkv = F.linear(tokens, weight.flatten(1), bias)
        y = self.to_out[0](attend(qkv, self.heads)).view(n, h, w, c).permute(0, 3, 1, 2)
    y = nhwc(y).add_(x)
    return y if self.rescale_output_factor == 1 else y.div_(self.rescale_output_factor)


def join_projections(blocks: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Weight and bias of one projection of the embedding to the shifts of all residual blocks."""
    layers = [block.time_emb_proj for block in blocks]
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _project(self: Any, embedding: Tensor) -> Tensor:
    """Every block's projection of the embedding; the joined weights as in :func:`_qkv`."""
    made = hasattr(self, "_kr_fast_proj_weight")
    weight, bias = (
        (self._kr_fast_proj_weight, self._kr_fast_proj_bias) if made else join_projections(self._kr_fast_shifted)
    )
    return F.linear(F.silu(embedding), weight, bias)


def all_shifts(self: Any, timestep: Tensor) -> Tensor:
    """``[classes, sum of channels]``: every block's projection at one timestep, for every class embedding."""
    embedding = self.time_embedding(self.time_proj(timestep.reshape(1)).to(self.dtype))
    if self.class_embedding is not None:
        embedding = embedding + self.class_embedding.weight.to(self.dtype)
    return _project(self, embedding)


def unet_shifts(self: Any, count: int, timestep: Tensor, class_labels: Tensor | None, step: Tensor | None) -> Shifts:
    """The shifts of ``count`` images: rows of the table, or computed once for each class or image."""
    table = getattr(self, "_kr_fast_table", None)
    if step is not None:
        if class_labels is None:
            return Shifts(table.index_select(0, step.reshape(1))[0].expand(count, -1))
        return Shifts(table.flatten(0, 1).index_select(0, step * table.shape[1] + class_labels))
    by_class = type(self.class_embedding) is nn.Embedding
    if timestep.numel() == 1 and class_labels is None:
        return Shifts(all_shifts(self, timestep).expand(count, -1))
    if timestep.numel() == 1 and by_class and self.class_embedding.num_embeddings <= count:
        return Shifts(all_shifts(self, timestep).index_select(0, class_labels))
    timesteps = timestep.expand(count) if timestep.numel() == 1 else timestep
    embedding = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
    if class_labels is not None:
        labels = self.time_proj(class_labels) if self.config.class_embed_type == "timestep" else class_labels
        embedding = embedding + self.class_embedding(labels).to(self.dtype)
    return Shifts(_project(self, embedding))


def unet(
    self: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    class_labels: Tensor | None = None,
    return_dict: bool = True,
    *,
    step: Tensor | None = None,
) -> Any:
    """``UNet2DModel``; ``step`` indexes the timesteps of ``prepare_steps`` and replaces ``timestep``."""
    from diffusers.models.unets.unet_2d import UNet2DOutput

    check_call(self, class_labels, step)
    if not torch.is_tensor(timestep):
        timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
    timestep = timestep.to(sample.device)
    shifts = unet_shifts(self, len(sample), timestep, class_labels, step)
    sample = nhwc(2 * sample - 1.0 if self.config.center_input_sample else sample)
    sample = nhwc(self.conv_in(sample))
    skips = [sample]
    for block in self.down_blocks:
        sample, more = block(hidden_states=sample, temb=shifts)
        skips += more
    del more  # or it would keep them alive
    if self.mid_block is not None:
        sample = self.mid_block(sample, shifts)
    for block in self.up_blocks:
        own = skips[-len(block.resnets) :]
        del skips[-len(own) :]
        sample = block(sample, own, shifts)  # which empties the list as it goes
    sample = self.conv_out(norm(self.conv_norm_out, nhwc(sample)))
    if self.config.time_embedding_type == "fourier":
        sample = sample / timestep.reshape(-1, 1, 1, 1)
    return UNet2DOutput(sample=sample) if return_dict else (sample,)
