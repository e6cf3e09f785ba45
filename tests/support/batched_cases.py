"""Cases and inputs of the ops over M models, and the formula of a residual block in float64.

Each layer that model_conv2d meets stands with the regime of the Triton kernels that it reaches.
"""

import dataclasses

import torch
import torch.nn.functional as F

from kr_fast.backends import registry
from kr_fast.backends.arguments import ConvOptions
from kr_fast.ops.batched.model_conv2d import model_conv2d


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """A layer, and the regime of the kernels that it reaches."""

    regime: str = "plain"
    size: tuple[int, int] = (5, 4)
    channels: int = 4
    outputs: int = 3
    models: int = 2
    images: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shared: bool = False
    residual: bool = False

    def __str__(self) -> str:
        return self.regime

    def small(self) -> bool:
        return self.channels * self.outputs <= 64 and self.images * self.size[0] <= 40

    def output_size(self) -> list[int]:
        return ConvOptions(self.stride, self.padding, self.dilation).output_size(self.size, self.kernel)

    def options(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


CONV_CASES = [
    ConvCase("K = 36 in one block with dead lanes, 3 outputs of 16 columns"),
    ConvCase("a stem: 3 models in one tile of columns", channels=3, outputs=16, size=(8, 8), shared=True, models=3),
    ConvCase("48 of 64 columns", channels=3, outputs=24, kernel=(2, 2), padding=(0, 0), shared=True),
    ConvCase("K = 147: blocks, tail", (9, 11), 3, 8, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase("several taps a block; 162 rows: tile, tail", channels=16, outputs=16, size=(9, 9), residual=True),
    ConvCase("a tile of rows spans images", channels=32, outputs=32, size=(4, 4), images=9, stride=(2, 2)),
    ConvCase("one tap a block; columns: a tile and a half", channels=64, outputs=96, size=(3, 3), images=1),
    ConvCase("two tiles of columns", channels=40, outputs=130, size=(2, 3), images=1, kernel=(1, 1), padding=(0, 0)),
    ConvCase("all unequal", (6, 7), 5, 7, kernel=(3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    ConvCase("a linear layer", (1, 1), kernel=(1, 1), padding=(0, 0), channels=20, outputs=5, images=70),
    ConvCase("all but one tap outside", (1, 1), models=1, channels=1, outputs=1, images=1),
    ConvCase("depthwise", (7, 7), channels=6, outputs=6, groups=6, residual=True),
    ConvCase("depthwise, multiplier 2", (9, 6), 6, 12, groups=6, kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    ConvCase("BatchNorm alone", channels=40, outputs=40, groups=40, kernel=(1, 1), padding=(0, 0), images=3),
    ConvCase("depthwise of a shared input", channels=4, outputs=4, groups=4, shared=True),
]
ACTIVATIONS = ["relu", "swish", "hardswish", "sigmoid", "tanh", ("leaky_relu", (0.1,), "")]
ACTIVATIONS += [("hardtanh", (-0.5, 0.7), ""), ("gelu", (), "none"), ("gelu", (), "tanh")]
# One unit of the last place of each dtype, of numbers of order 1.
UNITS = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def on(device, *tensors):
    """The tensors, of which some may be None, on a device."""
    return [None if each is None else each.to(device) for each in tensors]


def conv_inputs(case: ConvCase, dtype: torch.dtype, device: torch.device | str = "cpu"):
    """x, weight (of products' sum around 1), bias and residual."""
    generator = torch.Generator().manual_seed(case.channels + case.outputs)
    double = {"dtype": torch.float64, "generator": generator}
    inputs = case.channels // case.groups
    fan = inputs * case.kernel[0] * case.kernel[1]
    x = torch.randn(1 if case.shared else case.models, case.images, *case.size, case.channels, **double)
    weight = torch.randn(case.models, case.outputs, *case.kernel, inputs, **double) / fan**0.5
    bias = torch.randn(case.models, case.outputs, **double)
    residual = None
    if case.residual:
        residual = torch.randn(case.models, case.images, *case.output_size(), case.outputs, **double).to(dtype)
    bias = bias if dtype == torch.float64 else bias.float()
    return on(device, x.to(dtype), weight.to(dtype), bias, residual)


def exact_conv(inputs, case: ConvCase, **options):
    """float64 on the reference backend, from inputs of any dtype."""
    double = [None if each is None else each.double() for each in inputs]
    with registry.forced("reference"):
        return model_conv2d(*double, **case.options(), **options)


def batch_norm_inputs(shape=(3, 2, 4, 5, 6), dtype=torch.float64, residual=True, affine=True):
    """x, weight, bias and residual of model_batch_norm."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (normal(*shape) * 2 + 1).to(dtype)
    weight, bias = ((normal(shape[0], shape[4]) + 1).to(exact) for _ in range(2)) if affine else (None, None)
    return x, weight, bias, normal(*shape).to(dtype) if residual else None


def residual_block_inputs(channels, height, width, images, dtype, models=2, seed=0):
    """x, weight1, bias1, weight2, bias2 and (scale, shift), of sums around 1."""
    generator = torch.Generator().manual_seed(seed + channels + height)
    made = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(models, images, height, width, channels, **made)
    weights = [torch.randn(models, channels, 3, 3, channels, **made) / (9 * channels) ** 0.5 for _ in range(2)]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    biases = [torch.randn(models, channels, **made).to(exact) for _ in range(4)]
    inputs = [x.to(dtype), weights[0].to(dtype), biases[0], weights[1].to(dtype), biases[1]]
    return inputs, {"scale": biases[2], "shift": biases[3]}


def residual_block(x, weight1, bias1, weight2, bias2, scale=None, shift=None, relu=True, between=lambda h: h):
    """The docstring's formula in float64; ``between`` is applied to what the layers hand on."""
    result = []
    for m in range(len(x)):
        inner = x[m].double()
        if scale is not None:
            inner = between((inner * scale[m].double() + shift[m].double()).relu())
        for weight, bias in ((weight1, bias1), (weight2, bias2)):
            kernel = weight[m].double().permute(0, 3, 1, 2)
            z = F.conv2d(inner.permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1)
            inner = z if bias is None else z + bias[m].double()
            inner = between(inner.relu()) if weight is weight1 else inner
        y = inner + x[m].double()
        result.append(y.relu() if relu else y)
    return torch.stack(result)


HALVES = [torch.float16, torch.bfloat16]
# channels, height, width, images: regimes of the kernel
BLOCK_CASES = [
    (16, 32, 32, 1),  # ResNet-20's first stage: an image fills the warps
    (16, 28, 28, 2),  # rows and columns past the image's end
    (16, 9, 5, 3),  # one octet a row, so a warp's two are of two images, and the last of one
    (32, 16, 16, 3),  # two images at a time, then one
    (32, 7, 23, 2),  # three octets a row: a warp's two are of two images
    (16, 3, 40, 1),  # five octets: the last warp's second is of no image
    (32, 32, 32, 1),  # 16 warps
    (64, 8, 8, 5),  # four images at a time; the channels by two warps
    (64, 16, 16, 1),
    (64, 1, 1, 9),
]


def close_to_block(got, inputs, more, dtype):
    """To the rounding of the result and, here and there, of what lies between."""
    want = residual_block(*inputs, **more, between=lambda h: h.to(dtype).double())
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert (got.dtype, got.shape) == (dtype, want.shape)
    # A value between the layers that lies near a rounding boundary may go the other way: one unit times a weight.
    torch.testing.assert_close(got.double(), want, rtol=1.01 * unit, atol=2 * unit)
    assert float((got.double() - want).abs().mean()) <= 0.5 * unit * (1 + float(want.abs().mean()))
