"""ModelArray against loops over the models and torch.func.vmap, on a CPU.

Everyone starts from the same uint8 images and ends with phi ``[N, M]``. ``strong_loop``: BatchNorm folded,
channels_last, torch.compile with the weights as inputs (compiled once for all models). ``eager_nchw``: what public
audit tools do. The bfloat16 rows compare with the same loop in bfloat16. Each rival runs with the fastest of BATCHES,
found first.
"""

import functools
import time

import pytest
import torch
from small_networks import Airbench, models_of
from torch.func import functional_call, stack_module_state, vmap

import kr_fast
from kr_fast.data import to_float
from kr_fast.models import classifier
from kr_fast.ops.membership.membership_signals import membership_signals

LAST = torch.channels_last
BATCHES = {"strong_loop": (128, 512, 2048), "eager_nchw": (64, 256, 1024), "vmap": (16, 64, 256)}
MULTIPLICATIONS = {"resnet20": 40.6e6, "airbench": 118.1e6}  # of an image


NETWORKS = {  # and how many images
    "resnet20": (functools.partial(classifier, "resnet20", num_classes=10, in_channels=3), 2048),
    "airbench": (functools.partial(Airbench, (64, 256, 256), 10), 512),
}


def to_phi(logits, labels):
    return torch.stack([membership_signals(each, labels)["phi"] for each in logits], 1)


def split_call(run, x, batch):
    return torch.cat([run(part) for part in x.split(batch)])


def strong_loop(models, dtype):
    from torch.fx.experimental.optimization import fuse

    folded = [fuse(model).to(dtype).to(memory_format=LAST) for model in models]
    torch._dynamo.reset()
    one = folded[0]
    compiled = torch.compile(lambda state, x: functional_call(one, state, (x,)), dynamic=False)
    states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in folded]

    def run(images, labels, batch):
        x = to_float(images).to(dtype).contiguous(memory_format=LAST)
        return to_phi([split_call(lambda p, s=s: compiled(s, p), x, batch).float() for s in states], labels)

    return run


def eager_nchw(models, dtype):
    def run(images, labels, batch):
        return to_phi([split_call(model, to_float(images).contiguous(), batch) for model in models], labels)

    return run


def vmapped(models, dtype):
    state = stack_module_state(models)
    one = models[0]
    call = vmap(lambda parameters, buffers, x: functional_call(one, (parameters, buffers), (x,)), (0, 0, None))
    state = [{k: v.detach() for k, v in part.items()} for part in state]

    def run(images, labels, batch):
        x = to_float(images).contiguous()
        return to_phi(torch.cat([call(*state, part) for part in x.split(batch)], 1), labels)

    return run


def ours(models, dtype):
    array = kr_fast.ModelArray(models, dtype=dtype)
    return lambda images, labels, batch: array.signals(images, labels)["phi"][0]


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def best_batch(provider, run, images, labels):
    """By one run over all images each; the first batch, for which torch compiles, is run before."""
    result = {}
    for batch in (b for b in BATCHES.get(provider, (0,)) if b <= len(images)):
        run(images[: batch or None], labels[: batch or None], batch)
        result[batch] = seconds(run, images, labels, batch) if provider in BATCHES else 0
    return min(result, key=result.get)


PROVIDERS = {"kr_fast": ours, "strong_loop": strong_loop, "vmap": vmapped, "eager_nchw": eager_nchw}
CASES = [
    (network, dtype, provider)
    for network in NETWORKS
    for dtype in (torch.float32, torch.bfloat16)
    for provider in PROVIDERS
    if dtype == torch.float32 or provider in ("kr_fast", "strong_loop")
]


@pytest.mark.parametrize(("network", "dtype", "provider"), CASES, ids=str)
@torch.inference_mode()
def test_signals(benchmark, threads, network, dtype, provider):
    benchmark.group = f"{network} M=8 {str(dtype).removeprefix('torch.')} {threads} threads"
    models, images, labels, exact = case(network)
    run = PROVIDERS[provider](models, dtype)
    batch = best_batch(provider, run, images, labels)
    small = max(batch, 64)  # a whole batch: torch compiles for no other size
    error = float((run(images[:small], labels[:small], batch)[:64] - exact).abs().max())
    assert error < (1e-4 if dtype == torch.float32 else 0.3)
    benchmark.pedantic(run, (images, labels, batch), rounds=3)
    rate = len(models) * len(images) / benchmark.stats.stats.median
    a = torch.randn(2048, 2048, dtype=dtype)
    peak = 2 * 2048**3 / min(seconds(torch.mm, a, a) for _ in range(5)) / 1e9
    flops = 2 * MULTIPLICATIONS[network] * rate / 1e9
    benchmark.extra_info.update(
        error=error, batch=batch, image_models_per_s=rate, gflops=flops, percent_of_gemm=100 * flops / peak
    )


def case(network, count=8):
    """Models, images, labels, and phi of the first 64 images in float64."""
    make, images = NETWORKS[network]
    models = models_of(make, count, mild=True)
    data = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % 10
    exact = to_phi([model.double()(to_float(data[:64]).double()) for model in models], labels[:64])
    for model in models:
        model.float()
    return models, data, labels, exact
