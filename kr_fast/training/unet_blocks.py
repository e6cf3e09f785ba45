"""Parts of diffusers' UNets whose forward is the same whatever the layers in them compute with, and what they are."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.ops.nn.qkv_attention import qkv_attention
from kr_fast.training.layout import nhwc


def preactivates(self: Any) -> bool:
    """Whether a ``ResnetBlock2D`` is norms, SiLU and convolutions, with an embedding that is added between them."""
    return (
        self.upsample is self.downsample is None
        and self.time_embedding_norm == "default"
        and self.output_scale_factor == 1
        and isinstance(self.nonlinearity, nn.SiLU)
    )


def fusible(self: Any) -> bool:
    """Whether a ``ResnetBlock2D`` has the layers of ``preactivation_block``."""
    forms = [(self.conv1, (3, 3), (1, 1)), (self.conv2, (3, 3), (1, 1))]
    forms += [] if self.conv_shortcut is None else [(self.conv_shortcut, (1, 1), (0, 0))]
    return (
        preactivates(self)
        and all(type(each) is nn.GroupNorm and each.affine for each in (self.norm1, self.norm2))
        and all(
            type(conv) is nn.Conv2d
            and (conv.kernel_size, conv.padding, conv.stride) == (kernel, padding, (1, 1))
            and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
            for conv, kernel, padding in forms
        )
    )


def attends_to_pixels(module: Any) -> bool:
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


def up_block(
    self: Any,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...] | list[Tensor],
    temb: Any = None,
    upsample_size: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """``UpBlock2D`` and ``AttnUpBlock2D``: the skip connections go to the resnets as they are.

    A list of them is consumed, so that each is freed when it was used: the last block's are the largest.
    """
    skips = res_hidden_states_tuple if isinstance(res_hidden_states_tuple, list) else list(res_hidden_states_tuple)
    attentions = getattr(self, "attentions", [None] * len(self.resnets))
    for block, attend in zip(self.resnets, attentions, strict=True):
        hidden_states = block(hidden_states, temb, skip=skips.pop())
        if attend is not None:
            hidden_states = attend(hidden_states)
    for up in self.upsamplers or ():
        if getattr(self, "upsample_type", "conv") == "resnet":
            hidden_states = up(hidden_states, temb=temb)
        else:
            hidden_states = up(hidden_states, upsample_size)
    return hidden_states


def nearest_2x(x: Tensor) -> Tensor:
    """Each pixel four times, in channels_last."""
    n, c, h, w = x.shape
    if 4 * x.numel() < 2**31:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # torch's kernel for this layout counts in 32 bits; a copy does not.
    wide = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return wide.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def upsample(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """``Upsample2D``, without the copies to NCHW and back that diffusers makes from batch 64 on."""
    x = nhwc(hidden_states)
    x = nhwc(nearest_2x(x) if output_size is None else F.interpolate(x, size=output_size, mode="nearest"))
    conv = (self.conv if self.name == "conv" else self.Conv2d_0) if self.use_conv else None
    return x if conv is None else conv(x)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of ``[N, T, 3 * heads * d]``; on a CPU by this package's kernel where it has one for ``d``."""
    if qkv.device.type == "cpu" and qkv.shape[2] // (3 * heads) in (8, 16, 32, 64):
        return qkv_attention(qkv, heads)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
