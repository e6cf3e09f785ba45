"""What the benchmarks of the batched ops share: the models, the device, and the time of a call without its launches.

On a CPU a few models run the definitions, which shows that a benchmark is right and nothing else.
"""

import torch

from kr_fast.backends import registry
from kr_fast.ensemble.inference.autotune import seconds
from kr_fast.runtime.cuda_graph import capture

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODELS, IMAGES = (16, 64) if GPU else (2, 2)
CALLS = 10  # in a graph, so that launches and waits do not count
# pixels on a side, channels in, out, stride
LAYERS = {
    "resnet20 stage 1": (32, 16, 16, 1),
    "resnet20 stage 2": (16, 32, 32, 1),
    "resnet20 stage 3": (8, 64, 64, 1),
    "resnet20 down": (32, 16, 32, 2),
    "wrn-28-2 stage 1": (32, 32, 32, 1),
    "wrn-28-2 stage 3": (8, 128, 128, 1),
    "airbench stage 2": (15, 64, 256, 1),
    "resnet18 stage 4": (4, 512, 512, 1),
}


def normal(*size, dtype=torch.half, scale=1.0, seed=0):
    """Of a seed, on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(size, generator=generator, device=DEVICE) * scale).to(dtype)


def layer_inputs(layer, dtype=torch.half):
    """x ``[M, N, H, W, C]``, weight ``[M, O, 3, 3, C]``, bias ``[M, O]`` float32, stride."""
    side, channels, outputs, stride = LAYERS[layer]
    x = normal(MODELS, IMAGES, side, side, channels, dtype=dtype)
    weight = normal(MODELS, outputs, 3, 3, channels, dtype=dtype, scale=(9 * channels) ** -0.5, seed=1)
    return x, weight, normal(MODELS, outputs, dtype=torch.float32, seed=2), stride


def fastest(call, count):
    """``call(config)`` of the fastest tile shape, as ModelArray takes it."""
    return call(min(range(count), key=lambda config: seconds(call(config), DEVICE))) if count > 1 else call(0)


def exact(run):
    """``run()`` on the reference backend."""
    with registry.forced("reference"):
        return run()


def error_of(results, expected):
    """The largest difference beside the largest number, over pairs of tensors."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / (b.double().abs().max() + 1e-12)) for a, b in pairs)


def measure(benchmark, run, *, moved, flop=0, error):
    """Time ``run``: median seconds of a call, with GB/s of the least bytes that must move, and TFLOP/s."""
    step, calls = run, 1
    if GPU:
        graph, calls = capture(lambda: [run() for _ in range(CALLS)]), CALLS

        def step():
            graph.replay()
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20 if GPU else 2, warmup_rounds=3 if GPU else 0)
    benchmark.extra_info.update(calls=calls, error=error)
    if not benchmark.stats:  # under --benchmark-disable
        return
    median = benchmark.stats["median"] / calls
    benchmark.extra_info["gb_per_s"] = round(moved / median / 1e9, 1)
    if flop:
        benchmark.extra_info["tflop_per_s"] = round(flop / median / 1e12, 3)
