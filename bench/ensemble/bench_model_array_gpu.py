"""ModelArray against loops over the models and torch.func.vmap on a GPU.

Everyone answers for the same uint8 images, which lie on the GPU, and keeps logits ``[M, N, 10]`` there.

- ``strong_loop``: BatchNorm folded, half precision, channels_last, torch.compile with the weights as inputs (compiled
  once for all models), the whole batch captured in a CUDA graph for each model, float input made once for all models.
- ``eager_nchw``: what public audit tools do: float32, NCHW, batches of 256.
- ``vmap``: torch.func.vmap over stacked half-precision models.
- ``kr_fast``: half precision; steps and kernels measured at the first call, which is not timed.
"""

import functools

import pytest
import torch
from small_networks import Airbench, BasicBlock, WideResNet, stages
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import kr_fast
from kr_fast.benchmarks.cases.models import models_of
from kr_fast.data import to_float
from kr_fast.ensemble.inference.tiled_runner import TiledRunner
from kr_fast.models import classifier
from kr_fast.runtime.cuda_graph import capture

LAST = torch.channels_last
MODELS, IMAGES = 64, 8192
BATCH = {"strong_loop": 4096, "eager_nchw": 256, "vmap": 64}


def resnet18():
    """For images of 32 px."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    trunk = stages(BasicBlock, 64, (64, 128, 256, 512), (2, 2, 2, 2))
    return nn.Sequential(*stem, trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETWORKS = {
    "resnet20": functools.partial(classifier, "resnet20", num_classes=10, in_channels=3),
    "wrn-28-2": functools.partial(WideResNet, (32, 64, 128), (4, 4, 4), 10),
    "airbench": functools.partial(Airbench, (64, 256, 256), 10),
    "resnet18": resnet18,
}


def in_graph(run):
    """``run`` as a CUDA graph and what it writes to; as it is on a CPU."""
    if not torch.cuda.is_available():
        return run, None
    outputs = []
    graph = capture(lambda: outputs.append(run()))
    return graph.replay, outputs[-1]


def strong_loop(models, images):
    from torch.fx.experimental.optimization import fuse

    folded = [fuse(model).half().to(memory_format=LAST) for model in models]
    torch._dynamo.reset()
    one, batch = folded[0], min(BATCH["strong_loop"], len(images))
    compiled = torch.compile(lambda state, x: functional_call(one, state, (x,)), dynamic=False)
    states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in folded]
    seen = to_float(images[:batch]).half().contiguous(memory_format=LAST)
    steps = [in_graph(lambda s=s: compiled(s, seen)) for s in states]
    out = torch.empty(len(models), len(images), 10, dtype=torch.half, device=images.device)

    def run():
        for start in range(0, len(images), batch):
            seen.copy_(to_float(images[start : start + batch]))
            for m, (step, logits) in enumerate(steps):
                result = step()
                out[m, start : start + batch] = result if logits is None else logits
        return out

    return run


def eager_nchw(models, images):
    x = to_float(images).contiguous()
    parts = x.split(BATCH["eager_nchw"])
    return lambda: torch.stack([torch.cat([model(part) for part in parts]) for model in models])


def vmapped(models, images):
    state = stack_module_state([model.half() for model in models])
    state = [{k: v.detach() for k, v in part.items()} for part in state]
    one = models[0]
    call = vmap(lambda parameters, buffers, x: functional_call(one, (parameters, buffers), (x,)), (0, 0, None))
    parts = to_float(images).half().contiguous().split(BATCH["vmap"])
    return lambda: torch.cat([call(*state, part) for part in parts], 1)


def ours(models, images):
    array = kr_fast.ModelArray(models, dtype=torch.half)
    run = lambda: array(images)  # noqa: E731
    run.array = array
    return run


PROVIDERS = {"kr_fast": ours, "strong_loop": strong_loop, "vmap": vmapped, "eager_nchw": eager_nchw}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.inference_mode()
def test_logits(benchmark, network, provider):
    benchmark.group = f"{network} M={MODELS} N={IMAGES}"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    models = [model.cuda() for model in models_of(NETWORKS[network], MODELS)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8, generator=generator).cuda()
    exact = torch.stack([model.double()(to_float(images[:32]).double()).cpu() for model in models])
    for model in models:
        model.float()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = PROVIDERS[provider](models, images)
    error = float((run()[:, :32].cpu().double() - exact).abs().max())
    assert error < 0.1 * float(1 + exact.abs().max())
    peak = torch.cuda.max_memory_allocated() - before

    def timed():
        run()
        torch.cuda.synchronize()

    slow = provider in ("eager_nchw", "vmap")  # up to a minute
    benchmark.pedantic(timed, rounds=1 if slow else 3, warmup_rounds=0 if slow else 1)
    benchmark.extra_info.update(error=error, peak_mib=peak >> 20)
    if provider == "kr_fast":
        (runner,) = run.array.runners.values()
        assert isinstance(runner, TiledRunner)
        benchmark.extra_info.update(step=[runner.tile.models, runner.tile.images], kernels=runner.record["layers"])
