"""ModelArray against loops over the models and torch.func.vmap on a GPU.

Everyone answers for the same uint8 images, which lie on the GPU, and keeps logits ``[M, N, 10]`` there.

- ``strong_loop``: BatchNorm folded, half precision, channels_last, torch.compile with the weights as inputs (compiled
  once for all models), the whole batch captured in a CUDA graph for each model, float input made once for all models.
- ``eager_nchw``: what public audit tools do: float32, NCHW, batches of 256.
- ``vmap``: torch.func.vmap over stacked half-precision models.
- ``kr_fast``: half precision; steps and kernels measured at the first call, which is not timed.
"""

import pytest
import torch
from bench_model_array import airbench
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import kr_fast
from kr_fast.data import to_float
from kr_fast.ensemble.inference.tiled_runner import TiledRunner
from kr_fast.models import classifier

LAST = torch.channels_last
MODELS, IMAGES = 64, 8192
BATCH = {"strong_loop": 4096, "eager_nchw": 256, "vmap": 64}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; BatchNorm before (WRN) or behind (ResNet) each."""

    def __init__(self, inputs, outputs, stride, before):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs if before else outputs), nn.BatchNorm2d(outputs)
        self.before, self.short = before, None
        if inputs != outputs or stride > 1:
            self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        if self.before:
            x_in = torch.relu(self.bn1(x))
            y = self.conv2(torch.relu(self.bn2(self.conv1(x_in))))
            return y + (x if self.short is None else self.short(x_in))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.short is None else self.short(x)))


def residual(stem, widths, depth, before):
    blocks, inputs = [], stem
    for stage, width in enumerate(widths):
        for index in range(depth):
            blocks.append(Block(inputs, width, 2 if stage and not index else 1, before))
            inputs = width
    first = [nn.Conv2d(3, stem, 3, 1, 1, bias=False)] + ([] if before else [nn.BatchNorm2d(stem), nn.ReLU()])
    last = [nn.BatchNorm2d(inputs), nn.ReLU()] if before else []
    return nn.Sequential(*first, *blocks, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


NETWORKS = {
    "resnet20": lambda: classifier("resnet20", num_classes=10, in_channels=3),
    "wrn-28-2": lambda: residual(16, (32, 64, 128), 4, True),
    "airbench": airbench,
    "resnet18": lambda: residual(64, (64, 128, 256, 512), 2, False),
}


def models_of(make, count, device):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.running_mean.normal_(0, 0.1)
                    part.running_var.uniform_(0.5, 1.5)
        found.append(model.eval().to(device))
    return found


def in_graph(run):
    """``run`` as a CUDA graph; as it is on a CPU."""
    if not torch.cuda.is_available():
        return run, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


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
                found = step()
                out[m, start : start + batch] = found if logits is None else logits
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
    models = models_of(NETWORKS[network], MODELS, "cuda")
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
