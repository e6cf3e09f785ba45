"""ModelArray against loops over the models and torch.func.vmap, on a CPU: ``pytest bench/bench_model_array.py``.

Everyone answers for the same uint8 images and keeps the logits ``[M, N, 10]``. ``strong_loop``: BatchNorm folded,
channels_last, torch.compile with the weights as inputs (compiled once for all models), float input prepared once for
all models, in large batches. ``eager_nchw``: what public audit tools do. The bfloat16 rows compare with the same loop
in bfloat16.
"""

import resource

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import kr_fast
from kr_fast.data import to_float
from kr_fast.models import classifier

LAST = torch.channels_last
THREADS = 2
BATCH = {"strong_loop": 512, "eager_nchw": 256, "vmap": 64}  # not tuned for each machine


def resnet20():
    return classifier("resnet20", num_classes=10, in_channels=3), 2048


def airbench():
    """Three stages of two 3x3 convolutions behind a 2x2 one, max pooling, BatchNorm and GELU: 118 MMAC an image."""

    def stage(inputs, outputs):
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.GELU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU(),
        ]  # fmt: skip

    stem = [nn.Conv2d(3, 24, 2), nn.GELU()]
    trunk = [*stage(24, 64), *stage(64, 256), *stage(256, 256)]
    return nn.Sequential(*stem, *trunk, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(256, 10, bias=False)), 512


NETWORKS = {"resnet20": resnet20, "airbench": airbench}


def models_of(make, count):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model, images = make()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.running_mean.normal_(0, 0.1)
                    part.running_var.uniform_(0.5, 1.5)
        found.append(model.eval())
    return found, images


def split_call(run, x, batch):
    return torch.cat([run(part) for part in x.split(batch)])


def strong_loop(models, images, dtype):
    from torch.fx.experimental.optimization import fuse

    folded = [fuse(model).to(dtype).to(memory_format=LAST) for model in models]
    torch._dynamo.reset()
    one = folded[0]
    compiled = torch.compile(lambda state, x: functional_call(one, state, (x,)), dynamic=False)
    states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in folded]

    def run():
        x = to_float(images).to(dtype).contiguous(memory_format=LAST)
        return torch.stack([split_call(lambda p, s=s: compiled(s, p), x, BATCH["strong_loop"]) for s in states])

    return run


def eager_nchw(models, images, dtype):
    def run():
        out = []
        for model in models:
            x = to_float(images).contiguous()
            out.append(split_call(model, x, BATCH["eager_nchw"]))
        return torch.stack(out)

    return run


def vmapped(models, images, dtype):
    state = stack_module_state(models)
    one = models[0]
    call = vmap(lambda parameters, buffers, x: functional_call(one, (parameters, buffers), (x,)), (0, 0, None))
    state = [{k: v.detach() for k, v in part.items()} for part in state]

    def run():
        x = to_float(images).contiguous()
        return torch.cat([call(*state, part) for part in x.split(BATCH["vmap"])], 1)

    return run


def ours(models, images, dtype):
    array = kr_fast.ModelArray(models, dtype=dtype)
    return lambda: array(images)


PROVIDERS = {"kr_fast": ours, "strong_loop": strong_loop, "vmap": vmapped, "eager_nchw": eager_nchw}
CASES = [
    (network, dtype, provider)
    for network in NETWORKS
    for dtype in (torch.float32, torch.bfloat16)
    for provider in PROVIDERS
    if dtype == torch.float32 or provider in ("kr_fast", "strong_loop")
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("network", "dtype", "provider"), CASES, ids=str)
@torch.inference_mode()
def test_logits(benchmark, two_threads, network, dtype, provider):
    benchmark.group = f"{network} M=8 {str(dtype).removeprefix('torch.')} {THREADS} threads"
    models, count = models_of(NETWORKS[network], 8)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([model.double()(to_float(images[:64]).double()) for model in models])
    for model in models:
        model.float()
    run = PROVIDERS[provider](models, images, dtype)
    error = float((run()[:, :64].double() - exact).abs().max())
    assert error < (1e-4 if dtype == torch.float32 else 0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    benchmark.extra_info.update(error=error, peak_growth_mib=(after - before) / 1024)
