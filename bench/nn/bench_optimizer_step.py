"""A training step's end: clipping, SGD or AdamW, moving average of the weights, against torch's foreach and fused.

The best order that torch offers: ``clip_grad_norm_(foreach=True)``, the optimizer's step, ``torch._foreach_lerp_``.
"""

import copy

import pytest
import torch

from kr_fast.models import classifier, unet
from kr_fast.training import SGD, AdamW

# 213 tensors of 1.16 million numbers, more than L2; 47 of 175 thousand.
NETWORKS = {
    "unet": lambda: unet(28, 28, 1, 10, widths=(32, 64, 64), layers=1),
    "resnet14": lambda: classifier("resnet14", num_classes=10, in_channels=1, width=16),
}
ARGUMENTS = {
    "sgd": {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}
OURS = {"sgd": SGD, "adamw": AdamW}
TORCHS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
BYTES = {"sgd": 32, "adamw": 40}  # per number: the gradient twice, all else read and written once
DECAY = 0.99


def step_of(provider, kind, parameters):
    """The step of a provider, and its averages; from the second step on the decay is DECAY everywhere."""
    if provider == "kr_fast":
        optimizer = OURS[kind](parameters, **ARGUMENTS[kind], max_grad_norm=1.0, ema_decay=DECAY)
        optimizer.ema.optimization_step = 10_000  # past the first steps, whose decay is lower
        return optimizer.step, optimizer.ema.averages
    how = {} if provider == "exact" else {provider: True}
    optimizer = TORCHS[kind](parameters, **ARGUMENTS[kind], **how)
    averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    return step, averages


def parameters_of(network, dtype):
    return [p.to(dtype).requires_grad_() for p in copy.deepcopy(network).requires_grad_(False).parameters()]


def set_gradients(parameters, gradients):
    """Anew: torch's clipping writes into them."""
    for p, grad in zip(parameters, gradients, strict=True):
        p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)


@pytest.mark.parametrize("provider", ["kr_fast", "foreach", "fused"])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", NETWORKS)
def test_optimizer_step(benchmark, threads, name, kind, provider):
    benchmark.group = f"optimizer_step {kind} {name} {threads} threads"
    torch.manual_seed(0)
    network = NETWORKS[name]().to(memory_format=torch.channels_last)
    gradients = [torch.randn_like(p) for p in network.parameters()]
    found = []
    for how, dtype in ((provider, torch.float32), ("exact", torch.float64)):
        parameters = parameters_of(network, dtype)
        step, averages = step_of(how, kind, parameters)
        for _ in range(3):
            set_gradients(parameters, gradients)
            step()
        found.append([each.detach().double() for each in (*parameters, *averages)])
    error = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*found, strict=True))
    assert error < 1e-6
    parameters = parameters_of(network, torch.float32)
    set_gradients(parameters, gradients)
    step, _ = step_of(provider, kind, parameters)
    benchmark.extra_info["gradient_error"] = error
    benchmark.pedantic(step, rounds=200, iterations=1, warmup_rounds=10)
    if benchmark.stats:  # not under --benchmark-disable
        moved = BYTES[kind] * sum(p.numel() for p in parameters)
        benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
