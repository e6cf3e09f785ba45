"""Residual blocks of many models on a GPU: one kernel against kernels for each layer, and against the library's.

- ``layers``: `model_conv2d` for each layer, with the fastest of its tile shapes.
- ``loop``: the library's convolutions, model by model; sum and ReLU in place, each a pass of its own.
- ``compile``: that loop through torch.compile.

Blocks of ResNet-20 (ReLU behind the sum) and of WRN-28-2 (BatchNorm and ReLU first), float16.
"""

import pytest
import torch
import torch.nn.functional as F
from many_models import DEVICE, GPU, IMAGES, MODELS, error_of, exact, fastest, measure, normal

from kr_fast.backends import registry
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d
from kr_fast.ops.batched.model_residual_block import model_residual_block

# pixels on a side, channels, whether BatchNorm and ReLU come first
BLOCKS = {
    "resnet20 stage 1": (32, 16, False),
    "resnet20 stage 2": (16, 32, False),
    "resnet20 stage 3": (8, 64, False),
    "28 px, 16 channels": (28, 16, False),
    "wrn-28-2 stage 1": (32, 32, True),
    "wrn-28-2 stage 2": (16, 64, True),
}


def draw(side, channels, before):
    """x, two weights, two biases, and scale and shift of the BatchNorm or None."""
    weights = [normal(MODELS, channels, 3, 3, channels, scale=(9 * channels) ** -0.5, seed=seed) for seed in (1, 2)]
    biases = [normal(MODELS, channels, dtype=torch.float32, seed=seed) for seed in range(3, 7)]
    return normal(MODELS, IMAGES, side, side, channels), *weights, *biases[:2], *(biases[2:] if before else (None,) * 2)


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


def compiled(*inputs):
    torch._dynamo.reset()
    return torch.compile(loop(*inputs))


PROVIDERS = {"kr_fast": block, "layers": layers, "loop": loop, "compile": compiled}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_block(benchmark, name, provider):
    side, channels, _ = BLOCKS[name]
    call = ResidualBlockCall(DEVICE.type, torch.half, channels, side, side)
    if GPU and (why := registry.refusal("model_residual_block", "cuda", call)):
        pytest.skip(why)
    benchmark.group = f"model_residual_block, {name}: {MODELS} x {IMAGES} images {side}x{side}, {channels} channels"
    inputs = draw(*BLOCKS[name])
    run, expected = PROVIDERS[provider](*inputs), exact(block(*inputs))
    error = error_of(run(), expected)
    assert error < 0.01
    moved = 2 * (inputs[0].numel() + expected.numel() + 2 * inputs[1].numel())  # the least there is
    measure(benchmark, run, moved=moved, flop=2 * 2 * expected.numel() * 9 * channels, error=error)
