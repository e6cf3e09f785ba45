"""One layer of 16 models on a GPU: model_conv2d against a loop of the library's convolutions, a grouped one, and vmap.

Layers of ResNet-20, an airbench-like network, WRN-28-2 and ResNet-18 in half precision, with bias and ReLU for all.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from kr_fast.backends import registry
from kr_fast.ensemble.inference.autotune import captured, seconds
from kr_fast.ops.batched.model_conv2d import configs, model_conv2d

MODELS = 16
# images of a model, pixels on a side, channels in, out, stride
LAYERS = {
    "resnet20 stage 1": (64, 32, 16, 16, 1), "resnet20 stage 2": (64, 16, 32, 32, 1),
    "resnet20 stage 3": (64, 8, 64, 64, 1), "resnet20 down": (64, 32, 16, 32, 2),
    "wrn-28-2 stage 1": (64, 32, 32, 32, 1), "wrn-28-2 stage 3": (64, 8, 128, 128, 1),
    "airbench stage 2": (64, 15, 64, 256, 1), "resnet18 stage 4": (64, 4, 512, 512, 1),
}  # fmt: skip


def loop(x, weight, bias, stride):
    x, weight, half = x.permute(0, 1, 4, 2, 3), weight.permute(0, 1, 4, 2, 3), bias.to(x.dtype)
    return lambda: [F.conv2d(x[m], weight[m], half[m], stride, 1).relu_() for m in range(MODELS)]


def grouped(x, weight, bias, stride):
    """As HFTA: models are groups of channels, ``[N, M * C, H, W]``."""
    joined = x.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    kernels, half = weight.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous(), bias.flatten().to(x.dtype)
    return lambda: F.conv2d(joined, kernels, half, stride, 1, groups=MODELS).relu_()


def vmapped(x, weight, bias, stride):
    x, weight, half = x.permute(0, 1, 4, 2, 3), weight.permute(0, 1, 4, 2, 3).contiguous(), bias.to(x.dtype)
    call = vmap(lambda a, w, b: F.conv2d(a, w, b, stride, 1).relu())
    return lambda: call(x, weight, half)


CALLS = 10  # in a graph, so that launches and waits do not count


def fastest(call, count):
    """``call(config)`` of the fastest tile shape, as ModelArray takes it."""
    return call(min(range(count), key=lambda config: seconds(call(config), torch.device("cuda"))))


def ours(x, weight, bias, stride):
    def call(config):
        return lambda: model_conv2d(x, weight, bias, stride=stride, padding=1, activation="relu", config=config)

    return fastest(call, configs(weight))


def measure(benchmark, run):
    """Median seconds of a call."""
    graph = captured(lambda: [run() for _ in range(CALLS)])

    def timed():
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    benchmark.extra_info["calls"] = CALLS
    return benchmark.stats["median"] / CALLS


PROVIDERS = {"kr_fast": ours, "loop": loop, "grouped": grouped, "vmap": vmapped}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_layer(benchmark, layer, provider):
    images, size, channels, outputs, stride = LAYERS[layer]
    benchmark.group = f"{layer}: {MODELS} x {images} images {size}x{size}, {channels} to {outputs}"
    generator = torch.Generator("cuda").manual_seed(0)
    made = {"generator": generator, "device": "cuda"}
    x = torch.randn(MODELS, images, size, size, channels, **made).half()
    weight = (torch.randn(MODELS, outputs, 3, 3, channels, **made) / (9 * channels) ** 0.5).half()
    bias = torch.randn(MODELS, outputs, **made)
    run = PROVIDERS[provider](x, weight, bias, stride)
    with registry.forced("reference"):
        want = model_conv2d(x, weight, bias, stride=stride, padding=1, activation="relu")
    first = run()[0][0].flatten()[:16].float()  # of model 0, image 0: enough to see that it is the same layer
    if provider == "kr_fast":
        first = run()[0, 0].permute(2, 0, 1).flatten()[:16].float()
    assert torch.allclose(first, want[0, 0].permute(2, 0, 1).flatten()[:16].float(), atol=0.02)

    seconds = measure(benchmark, run)
    flop = 2 * want.numel() * 9 * channels
    moved = 2 * (x.numel() + want.numel() + weight.numel())
    benchmark.extra_info.update(tflop_per_s=round(flop / seconds / 1e12, 1), gb_per_s=round(moved / seconds / 1e9))
