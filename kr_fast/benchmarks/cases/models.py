"""``ModelArray`` against loops over the models and torch.func.vmap, on a CPU.

Everyone starts from the same uint8 images and ends with phi ``[N, M]``. ``strong_loop``: BatchNorm folded,
channels_last, torch.compile with the weights as inputs (compiled once for all models). ``eager_nchw``: what public
audit tools do. Each rival runs with the fastest of BATCHES, found first. The error is that of phi against float64.
"""

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from kr_fast.benchmarks.case import Case, Work, attempt, compiled, needs_bfloat16
from kr_fast.data import to_float
from kr_fast.ensemble.inference.model_array import ModelArray
from kr_fast.models import classifier
from kr_fast.ops.membership.membership_signals import membership_signals

COUNT, IMAGES, CHECKED = 8, 256, 64
BATCHES = {"strong_loop": (128, 512, 2048), "eager_nchw": (64, 256, 1024), "vmap": (16, 64, 256)}
Run = Callable[[Tensor, Tensor, int], Tensor]


def to_phi(logits: Any, labels: Tensor) -> Tensor:
    """Per model's logits to ``[N, M]``."""
    return torch.stack([membership_signals(each, labels)["phi"] for each in logits], 1)


def _in_batches(run: Callable, x: Tensor, batch: int) -> Tensor:
    return torch.cat([run(part) for part in x.split(batch)])


def strong_loop(models: list[nn.Module], dtype: torch.dtype) -> Run:
    """The best loop that torch offers."""
    from torch.fx.experimental.optimization import fuse

    folded = [fuse(model).to(dtype).to(memory_format=torch.channels_last) for model in models]
    one = folded[0]
    call = compiled(lambda state, x: functional_call(one, state, (x,)))
    states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in folded]

    def run(images: Tensor, labels: Tensor, batch: int) -> Tensor:
        x = to_float(images).to(dtype).contiguous(memory_format=torch.channels_last)
        return to_phi([_in_batches(lambda p, s=s: call(s, p), x, batch).float() for s in states], labels)

    return run


def eager_nchw(models: list[nn.Module], dtype: torch.dtype) -> Run:
    """One model after the other as they are."""

    def run(images: Tensor, labels: Tensor, batch: int) -> Tensor:
        return to_phi([_in_batches(model, to_float(images).contiguous(), batch) for model in models], labels)

    return run


def vmapped(models: list[nn.Module], dtype: torch.dtype) -> Run:
    """All models at once by torch."""
    state = [{name: tensor.detach() for name, tensor in part.items()} for part in stack_module_state(models)]
    one = models[0]
    call = vmap(lambda parameters, buffers, x: functional_call(one, (parameters, buffers), (x,)), (0, 0, None))

    def run(images: Tensor, labels: Tensor, batch: int) -> Tensor:
        x = to_float(images).contiguous()
        return to_phi(torch.cat([call(*state, part) for part in x.split(batch)], 1), labels)

    return run


def ours(models: list[nn.Module], dtype: torch.dtype) -> Run:
    """By this package."""
    array = ModelArray(models, dtype=dtype)
    return lambda images, labels, batch: array.signals(images, labels)["phi"][0]


PROVIDERS = {"kr_fast": ours, "strong_loop": strong_loop, "vmap": vmapped, "eager_nchw": eager_nchw}


def models_of(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    """Networks of seeds 0, 1, ... in eval mode, whose BatchNorms do something: statistics near 0 and 1."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_(0, 0.1)
                    part.running_var.uniform_(0.5, 1.5)
        models.append(model.eval())
    return models


resnet20s = functools.partial(models_of, functools.partial(classifier, "resnet20", num_classes=10, in_channels=3))


def best_batch(run: Run, batches: tuple[int, ...], images: Tensor, labels: Tensor) -> int:
    """By one run over all images each; the first batch, for which torch compiles, is run before."""
    seconds = {}
    for batch in (b for b in batches if b <= len(images)):
        run(images[:batch], labels[:batch], batch)
        start = time.perf_counter()
        run(images, labels, batch)
        seconds[batch] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


@torch.inference_mode()
def work(provider: str, make: Callable[[int], list[nn.Module]], images: int, dtype: torch.dtype) -> Work:
    """The same models and images for all providers."""
    if dtype == torch.bfloat16:
        needs_bfloat16()
    models = make(COUNT)
    data = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % 10
    copies = [copy.deepcopy(model).double() for model in models]
    exact = to_phi([model(to_float(data[:CHECKED]).double()) for model in copies], labels[:CHECKED])
    run = PROVIDERS[provider](models, dtype)
    if provider in BATCHES:
        batch = attempt(lambda: best_batch(run, BATCHES[provider], data, labels))
    else:
        batch = images
    small = max(batch, CHECKED)  # a whole batch: torch compiles for no other size
    error = float((run(data[:small], labels[:small], batch)[:CHECKED] - exact).abs().max())
    return Work(torch.inference_mode()(lambda: run(data, labels, batch)), error)


def case(name: str, make: Callable[[int], list[nn.Module]], images: int, dtype: torch.dtype) -> Case:
    """Of 8 models; in bfloat16 beside the strong loop alone."""
    names = PROVIDERS if dtype == torch.float32 else ("kr_fast", "strong_loop")
    providers = {each: functools.partial(work, each, make, images, dtype) for each in names}
    kind = str(dtype).removeprefix("torch.")
    return Case(f"{COUNT} x {name}, {images} images, {kind}", providers, 1e-4 if dtype == torch.float32 else 0.3)


def cases(device: str) -> list[Case]:
    """Those of a CPU; a GPU's are in ``bench/ensemble``."""
    if device != "cpu":
        return []
    return [case("resnet20", resnet20s, IMAGES, dtype) for dtype in (torch.float32, torch.bfloat16)]
