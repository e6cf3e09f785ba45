"""One layer of many models: model_conv2d against a loop of the library's convolutions, a grouped one, vmap and compile.

Layers of ResNet-20, an airbench-like network, WRN-28-2 and ResNet-18 in half precision, with bias and ReLU for all.
"""

import pytest
import torch
import torch.nn.functional as F
from many_models import IMAGES, LAYERS, MODELS, error_of, exact, fastest, layer_inputs, measure
from torch.func import vmap

from kr_fast.ops.batched.model_conv2d import configs, model_conv2d


def ours(x, weight, bias, stride):
    def call(config):
        return lambda: model_conv2d(x, weight, bias, stride=stride, padding=1, activation="relu", config=config)

    return fastest(call, configs(weight))


def loop(x, weight, bias, stride):
    x, weight, half = x.permute(0, 1, 4, 2, 3), weight.permute(0, 1, 4, 2, 3), bias.to(x.dtype)
    return lambda: [F.conv2d(x[m], weight[m], half[m], stride, 1).relu_().permute(0, 2, 3, 1) for m in range(MODELS)]


def compiled(x, weight, bias, stride):
    torch._dynamo.reset()
    return torch.compile(loop(x, weight, bias, stride))


def grouped(x, weight, bias, stride):
    """As HFTA: models are groups of channels, ``[N, M * C, H, W]``."""
    joined = x.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    kernels, half = weight.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous(), bias.flatten().to(x.dtype)

    def run():
        y = F.conv2d(joined, kernels, half, stride, 1, groups=MODELS).relu_()
        return y.unflatten(1, (MODELS, -1)).permute(1, 0, 3, 4, 2)

    return run


def vmapped(x, weight, bias, stride):
    x, weight, half = x.permute(0, 1, 4, 2, 3), weight.permute(0, 1, 4, 2, 3).contiguous(), bias.to(x.dtype)
    call = vmap(lambda a, w, b: F.conv2d(a, w, b, stride, 1).relu())
    return lambda: call(x, weight, half).permute(0, 1, 3, 4, 2)


PROVIDERS = {"kr_fast": ours, "loop": loop, "compile": compiled, "grouped": grouped, "vmap": vmapped}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_layer(benchmark, layer, provider):
    side, channels, outputs, _ = LAYERS[layer]
    benchmark.group = f"model_conv2d, {layer}: {MODELS} x {IMAGES} images {side}x{side}, {channels} to {outputs}"
    x, weight, bias, stride = layer_inputs(layer)
    run = PROVIDERS[provider](x, weight, bias, stride)
    expected = exact(lambda: model_conv2d(x, weight, bias, stride=stride, padding=1, activation="relu"))
    error = error_of(run(), expected)
    assert error < 4e-3
    moved = 2 * (x.numel() + expected.numel() + weight.numel())
    measure(benchmark, run, moved=moved, flop=2 * expected.numel() * 9 * channels, error=error)
