"""Group norm and layer norm in a private step; a group norm with SiLU behind it in one pass where a kernel has it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import kr_fast.ops.nn.group_norm_silu  # noqa: F401  (registers the op)
from kr_fast.backends import arguments, registry
from kr_fast.backends.arguments import GroupNormGradient
from kr_fast.backends.calls import GroupNormCall
from kr_fast.backends.cpu.nn import group_norm_relu, group_norm_relu_sample_gradients, group_norm_sample_gradients
from kr_fast.privacy.layers import Layer, Samples, by_record
from kr_fast.training.conditions import plain
from kr_fast.training.layout import nhwc


class _Norm(Layer):
    """A normalisation with weight and bias, whose per-sample gradients are always few enough to keep."""

    def keeps_samples(self, grad: Tensor, x: Tensor) -> bool:
        return True

    def _both(self, grad: Tensor, normal: Tensor, kept: int) -> Samples:
        """Sums over all positions of a record but those of ``kept`` dimensions from the second on."""
        found = []
        if "weight" in self.trained:
            found.append(("weight", by_record((grad * normal).flatten(kept).sum(kept), self.multiplicity)))
        if "bias" in self.trained:
            found.append(("bias", by_record(grad.flatten(kept).sum(kept), self.multiplicity)))
        return found


class _Fused(torch.autograd.Function):
    """A group norm of images, with a shift before and SiLU behind it, or without."""

    @staticmethod
    def forward(ctx: Any, layer: "GroupNorm", anchor: Tensor, *arguments: Any) -> Tensor:
        x, shift, silu = arguments
        y, mean, rstd = layer.fused(*arguments)
        ctx.layer, ctx.silu = layer, silu
        ctx.save_for_backward(x, None, shift, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_x, _, by_shift = ctx.layer.fused_backward(grad, ctx.saved_tensors, ctx.silu)
        return None, None, by_x, by_shift, None


class GroupNorm(_Norm):
    """``nn.GroupNorm`` of ``[N, C, *]``.

    In float32 on a CPU it is this package's, whose backward pass has the per-sample gradients at hand.
    """

    def on_images(self, x: Tensor, *, shift: Tensor | None = None, silu: bool = False) -> Tensor:
        """``group_norm_silu`` of channels_last ``x``, where the kernel :meth:`fuses` it."""
        if not torch.is_grad_enabled():
            return self.fused(x, shift, silu)[0]
        return _Fused.apply(self, self.anchor, x, shift, silu)

    @staticmethod
    def fuses(x: Tensor) -> bool:
        """Whether the kernel that has per-sample gradients takes ``x``."""
        call = GroupNormCall(x.device.type, x.dtype, True)
        return plain(x) and x.numel() > 0 and registry.runs_preferred("group_norm_silu", call)

    def call(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or not self.fuses(x):
            return super().call(x)
        y = self.on_images(nhwc(x if x.ndim == 4 else x[..., None]))  # rows of positions are images of one column
        return y if x.ndim == 4 else y.squeeze(3)

    def fused(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and 1 / deviation; of x, shift and whether SiLU follows."""
        norm, (x, shift, silu) = self.module, arguments
        affine = norm.weight, norm.bias, norm.num_groups, norm.eps
        return torch.ops.kr_fast.group_norm_silu_forward(x, None, shift, *affine, silu)

    def fused_backward(self, grad: Tensor, kept: tuple[Tensor | None, ...], silu: bool) -> list[Tensor | None]:
        """Gradients by x, skip and shift; those of the parameters are kept."""
        norm, (x, skip, shift, mean, rstd) = self.module, kept
        inputs = nhwc(grad), x, skip, shift, norm.weight, norm.bias
        *signals, samples = group_norm_sample_gradients(GroupNormGradient(*inputs, mean, rstd, norm.num_groups, silu))
        self._keep_rows(x, samples)
        return signals

    def fused_relu(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``relu(norm(x) + residual)``, mean and 1 / deviation."""
        norm = self.module
        affine = norm.weight, norm.bias, norm.num_groups, norm.eps
        return group_norm_relu(arguments.GroupNorm(x, None, None, *affine, False), residual)

    def fused_relu_backward(
        self, grad: Tensor, y: Tensor, kept: tuple[Tensor, ...], passes: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients by x and, if asked for, by the residual; those of the parameters are kept."""
        norm, (x, mean, rstd) = self.module, kept
        call = GroupNormGradient(grad, x, None, None, norm.weight, norm.bias, mean, rstd, norm.num_groups, False)
        by_x, passed, samples = group_norm_relu_sample_gradients(call, y, passes)
        self._keep_rows(x, samples)
        return by_x, passed

    def _keep_rows(self, x: Tensor, samples: Tensor) -> None:
        """Keep what the kernel found by row of the batch."""
        self.check(x)
        rows = by_record(samples, self.multiplicity).unbind(1)
        self.keep([(name, each) for name, each in zip(("weight", "bias"), rows, strict=True) if name in self.trained])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        norm, (n, c) = self.module, x.shape[:2]
        sizes = n, c, x.shape[2:].numel(), norm.num_groups
        return torch.native_group_norm(_dense(x), norm.weight, norm.bias, *sizes, norm.eps)

    def signal(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        norm, (n, c) = self.module, x.shape[:2]
        sizes = n, c, x.shape[2:].numel(), norm.num_groups
        x = _dense(x)
        grad = grad.contiguous() if x.is_contiguous() else nhwc(grad)
        tensors = grad, x, mean, rstd, norm.weight
        return torch.ops.aten.native_group_norm_backward(*tensors, *sizes, [True, False, False])[0]

    def samples(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Samples:
        grouped = x.reshape(*mean.shape, -1).float()
        normal = ((grouped - mean[..., None]) * rstd[..., None]).view(x.shape[0], x.shape[1], -1)
        return self._both(grad.reshape(normal.shape).float(), normal, 2)


class LayerNorm(_Norm):
    """``nn.LayerNorm``."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        norm = self.module
        return torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def signal(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        norm = self.module
        tensors = mean, rstd, norm.weight, norm.bias
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(grad.contiguous(), x, norm.normalized_shape, *tensors, [True, False, False])[0]

    def samples(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Samples:
        shape = self.module.normalized_shape
        normal, grad = (x.float() - mean) * rstd, grad.float()
        between = tuple(range(1, x.ndim - len(shape)))
        parts = {"weight": grad * normal, "bias": grad}
        return [
            (name, by_record(each.sum(between) if between else each, self.multiplicity))
            for name, each in parts.items()
            if name in self.trained
        ]


def _dense(x: Tensor) -> Tensor:
    """``x`` in a layout that torch's group norm takes: on a CPU also channels_last."""
    last = x.ndim == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()
