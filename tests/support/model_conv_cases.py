"""Layers that model_conv2d meets, each with the regime of the Triton kernels that it reaches."""

import dataclasses

import torch

from kr_fast.ops.batched.model_conv2d import output_size


@dataclasses.dataclass(frozen=True)
class Case:
    models: int = 2
    images: int = 2
    size: tuple[int, int] = (5, 4)
    channels: int = 4
    outputs: int = 3
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shared: bool = False
    residual: bool = False

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return " ".join(changed).replace(", ", "x") or "plain"

    def small(self) -> bool:
        return self.channels * self.outputs <= 64 and self.images * self.size[0] <= 40

    def output_size(self) -> list[int]:
        each = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [output_size(*axis) for axis in each]

    def options(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


CASES = [
    Case(),  # K = 36 in one block with dead lanes, 3 outputs of 16 columns
    Case(channels=3, outputs=16, size=(8, 8), shared=True, models=3),  # a stem: 3 models in one tile of columns
    Case(channels=3, outputs=24, kernel=(2, 2), padding=(0, 0), shared=True),  # airbench's: 48 of 64 columns
    Case(
        channels=3, outputs=8, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(9, 11)
    ),  # K = 147: blocks and a tail
    Case(
        channels=16, outputs=16, size=(9, 9), residual=True
    ),  # a block holds several taps; 162 rows: a tile and a tail
    Case(channels=32, outputs=32, size=(4, 4), images=9, stride=(2, 2)),  # a tile of rows spans images
    Case(channels=64, outputs=96, size=(3, 3), images=1),  # one tap a block; columns: a tile and a half
    Case(
        channels=40, outputs=130, size=(2, 3), images=1, kernel=(1, 1), padding=(0, 0)
    ),  # 1x1, K = 40; two columns' tiles
    Case(channels=5, outputs=7, kernel=(3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), size=(6, 7)),
    Case(size=(1, 1), kernel=(1, 1), padding=(0, 0), channels=20, outputs=5, images=70),  # a linear layer
    Case(models=1, size=(1, 1), channels=1, outputs=1, images=1),  # all but one tap outside
    Case(channels=6, outputs=6, groups=6, size=(7, 7), residual=True),  # depthwise
    Case(channels=6, outputs=12, groups=6, kernel=(5, 5), padding=(2, 2), stride=(2, 2), size=(9, 6)),  # multiplier 2
    Case(channels=40, outputs=40, groups=40, kernel=(1, 1), padding=(0, 0), images=3),  # BatchNorm alone
    Case(channels=4, outputs=4, groups=4, shared=True),  # depthwise of a shared input
]
ACTIVATIONS = [
    "relu", "swish", "hardswish", "sigmoid", "tanh", ("leaky_relu", (0.1,), ""), ("hardtanh", (-0.5, 0.7), ""),
    ("gelu", (), "none"), ("gelu", (), "tanh"),
]  # fmt: skip


def draw(case: Case, dtype: torch.dtype):
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
    return x.to(dtype), weight.to(dtype), bias, residual


def exact(inputs, case: Case, **options):
    """float64 on the reference backend, from inputs of any dtype."""
    from kr_fast.backends import registry
    from kr_fast.ops.batched.model_conv2d import model_conv2d

    double = [None if each is None else each.double() for each in inputs]
    with registry.forced("reference"):
        return model_conv2d(*double, **case.options(), **options)
