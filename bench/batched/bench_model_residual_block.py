"""Residual blocks of 16 models on a GPU: one kernel against kernels for each layer, and against the library's.

- ``layers``: `model_conv2d` for each layer, with the fastest of its tile shapes.
- ``loop``: the library's convolutions, model by model; sum and ReLU in place, each a pass of its own.

Blocks of ResNet-20 (ReLU behind the sum) and of WRN-28-2 (BatchNorm and ReLU first), float16.
"""

import pytest
import torch
import torch.nn.functional as F
from bench_model_conv2d import fastest, measure

from kr_fast.backends import registry
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d
from kr_fast.ops.batched.model_residual_block import model_residual_block

MODELS = 16
# images of a model, pixels on a side, channels, whether BatchNorm and ReLU come first
BLOCKS = {
    "resnet20 stage 1": (64, 32, 16, False), "resnet20 stage 2": (64, 16, 32, False),
    "resnet20 stage 3": (64, 8, 64, False), "28 px, 16 channels": (64, 28, 16, False),
    "wrn-28-2 stage 1": (64, 32, 32, True), "wrn-28-2 stage 2": (64, 16, 64, True),
}  # fmt: skip


def draw(images, size, channels, before, models=MODELS, device="cuda"):
    """x, two weights, two biases, and scale and shift of the BatchNorm or None."""
    made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(models, images, size, size, channels, **made).half()
    weights = [(torch.randn(models, channels, 3, 3, channels, **made) / (9 * channels) ** 0.5).half() for _ in range(2)]
    biases = [torch.randn(models, channels, **made) for _ in range(4)]
    return x, *weights, *biases[:2], *(biases[2:] if before else (None, None))


def block(x, weight1, weight2, bias1, bias2, scale, shift):
    more = {"scale": scale, "shift": shift, "relu": scale is None}
    return lambda: model_residual_block(x, weight1, bias1, weight2, bias2, **more)


def layers(x, weight1, weight2, bias1, bias2, scale, shift):
    last = "relu" if scale is None else None

    def call(config):
        def run():
            inner = x
            if scale is not None:
                norm = scale[:, :, None, None, None].half()
                inner = model_conv2d(x, norm, shift, groups=x.shape[4], activation="relu")
            middle = model_conv2d(inner, weight1, bias1, padding=1, activation="relu", config=config)
            return model_conv2d(middle, weight2, bias2, x, padding=1, activation=last, config=config)

        return run

    return fastest(call, configs(weight1))


def loop(x, weight1, weight2, bias1, bias2, scale, shift):
    x, weight1, weight2 = (each.permute(0, 1, 4, 2, 3) for each in (x, weight1, weight2))
    bias1, bias2, scale, shift = (None if each is None else each.half() for each in (bias1, bias2, scale, shift))

    def one(m):
        inner = x[m]
        if scale is not None:
            inner = (inner * scale[m, :, None, None] + shift[m, :, None, None]).relu_()
        inner = F.conv2d(inner, weight1[m], bias1[m], padding=1).relu_()
        y = F.conv2d(inner, weight2[m], bias2[m], padding=1).add_(x[m])
        return (y.relu_() if scale is None else y).permute(0, 2, 3, 1)

    return lambda: [one(m) for m in range(len(x))]


PROVIDERS = {"kr_fast": block, "layers": layers, "loop": loop}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_block(benchmark, name, provider):
    images, size, channels, _ = BLOCKS[name]
    if why := registry.refusal(
        "model_residual_block", "cuda", ResidualBlockCall("cuda", torch.half, channels, size, size)
    ):
        pytest.skip(why)
    benchmark.group = f"{name}: {MODELS} x {images} images {size}x{size}, {channels} channels"
    inputs = draw(*BLOCKS[name])
    run = PROVIDERS[provider](*inputs)
    with registry.forced("reference"):
        want = block(*inputs)()
    with registry.forced("cuda" if provider == "kr_fast" else None):
        found = run()
    errors = [float((got - right).abs().max()) for got, right in zip(found, want, strict=True)]
    assert max(errors) < 0.05

    seconds = measure(benchmark, run)
    flop = 2 * 2 * want.numel() * 9 * channels
    moved = 2 * (inputs[0].numel() + want.numel() + 2 * inputs[1].numel())  # the least there is
    benchmark.extra_info.update(
        error=max(errors), tflop_per_s=round(flop / seconds / 1e12, 1), gb_per_s=round(moved / seconds / 1e9)
    )
