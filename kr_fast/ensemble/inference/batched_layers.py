"""A layer recipe bound to the weights of all models at once: what a GPU runs for a group of them.

Values are ``[G * B, C, H, W]``, channels last: G models of B images, model after model, so what treats images alike
runs on all models as on a larger batch. A convolution has several kernels: "own:i" (tile shape i of
``ops.model_conv2d``) for all models in one launch, and "loop", a convolution of the library for each model and one
fused pass for what follows it. ``autotune.py`` measures which is used.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.backends.arguments import ConvOptions, View
from kr_fast.backends.exact import float32_products
from kr_fast.ensemble.graph.lowering import Layer
from kr_fast.ensemble.inference.layers import folded
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d

LAST = torch.channels_last


class ImageBatch:
    """A chunk of uint8 images ``[B, H, W, C]`` and how models see it; turned into numbers by the first layer."""

    def __init__(self, images: Tensor, view: View):
        self.images, self.view = images, view

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """``[B, C, h, w]``, channels_last."""
        x = self.images[:, self.view.rows.long()[:, None], self.view.columns.long()]
        return (x * self.view.scale + self.view.shift).to(dtype).permute(0, 3, 1, 2)

    def repeated(self, models: int, dtype: torch.dtype) -> Tensor:
        """``[models * B, C, h, w]``: a copy for each model, for a layer that cannot share them."""
        return self.numbers(dtype).repeat(models, 1, 1, 1).contiguous(memory_format=LAST)


class BatchedLayer:
    """Layer ``layer`` with the weights of all ``models``, folded in float64, in ``dtype``."""

    def __init__(self, layer: Layer, models: Sequence[nn.Module], dtype: torch.dtype, spatial: bool):
        """``spatial``: the input has height and width, or else channels in its last dimension."""
        self.layer, self.dtype, self.spatial = layer, dtype, spatial
        exact = torch.promote_types(dtype, torch.float32)
        weights, biases = [], []
        for model in models:
            weight, bias = folded(layer, model)
            if layer.kind == "conv":
                weight = weight.permute(0, 2, 3, 1)
            elif layer.kind == "linear":
                weight = weight[:, None, None]
            else:
                weight = weight[:, None, None, None]
            weights.append(weight.detach().to(dtype).contiguous())
            biases.append(None if bias is None else bias.detach().to(exact))
        self.weight = torch.stack(weights)
        self.bias = None if biases[0] is None else torch.stack(biases)
        self.options = {"groups": self.weight.shape[1] if layer.kind == "affine" else 1}
        if layer.kind == "conv":
            part = models[0].get_submodule(layer.module)
            geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": part.dilation}
            self.options = {**geometry, "groups": part.groups}
        groups = self.options["groups"]
        self.kind = ConvOptions(groups=groups).kind(self.weight.shape[4] * groups)

    def kernels(self, shared: bool) -> list[str]:
        """Names of the kernels that can run it, the one expected best first."""
        loop = ["loop"] if self.layer.kind == "conv" else []
        if self.kind == "grouped":
            return loop
        return [f"own:{i}" for i in range(configs(self.weight, self.options["groups"], shared))] + loop

    def run(self, group: slice, kernel: str, x: Tensor | ImageBatch, other: Tensor | None = None) -> Tensor:
        """The layer of the models of ``group`` by ``kernel``; ``other`` is the residual."""
        if kernel == "loop":
            return self._loop(group, x, other)
        weight, bias = self.weight[group], of_group(self.bias, group)
        options = dict(self.options, activation=self.layer.activation, config=int(kernel.split(":")[1]))
        if isinstance(x, ImageBatch):
            return merged(model_conv2d(x.images[None], weight, bias, view=x.view, **options))
        models = len(weight)
        if self.spatial:
            residual = None if other is None else split(other, models)
            return merged(model_conv2d(split(x, models), weight, bias, residual, **options))
        flat = x.reshape(models, -1, 1, 1, x.shape[-1])
        return model_conv2d(flat, weight, bias, **options).view(*x.shape[:-1], weight.shape[1])

    def _loop(self, group: slice, x: Tensor | ImageBatch, other: Tensor | None) -> Tensor:
        weight, bias = self.weight[group].permute(0, 1, 4, 2, 3), of_group(self.bias, group)
        models, layer, options = len(weight), self.layer, self.options
        if isinstance(x, ImageBatch):
            parts = [x.numbers(self.dtype)] * models
        else:
            parts = x.chunk(models) if models > 1 else [x]
        rest = (None, options["stride"], options["padding"], options["dilation"], options["groups"])
        # TF32 is not float32: the library must not choose it.
        with float32_products(enabled=True, benchmark=False):
            y = [F.conv2d(part, each, *rest) for part, each in zip(parts, weight, strict=True)]
        y = y[0] if models == 1 else torch.cat(y)
        if bias is None and other is None and layer.activation is None:
            return y
        # What follows in one pass: a depthwise 1x1 convolution by ones.
        y, channels = split(y, models), y.shape[1]
        ones = y.new_ones(models, channels, 1, 1, 1)
        residual = None if other is None else split(other, models)
        return merged(model_conv2d(y, ones, bias, residual, groups=channels, activation=layer.activation))


def of_group(value: Tensor | None, group: slice) -> Tensor | None:
    """What is of the models of ``group``, if there is a value."""
    return None if value is None else value[group]


def split(x: Tensor, models: int) -> Tensor:
    """``[G * B, C, H, W]`` as ``[G, B, H, W, C]``."""
    x = x.permute(0, 2, 3, 1).contiguous()
    return x.view(models, len(x) // models, *x.shape[1:])


def merged(y: Tensor) -> Tensor:
    """The inverse of :func:`split`."""
    return y.flatten(0, 1).permute(0, 3, 1, 2)
