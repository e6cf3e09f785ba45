"""One step of SGD with Nesterov momentum of many ResNet-20, each with a learning rate of its own.

``optimizer``: torch's own multi-tensor step, model by model, as torch.optim.SGD runs it; ``eager``: the formula on the
stack of each parameter; ``compile``: that through torch.compile.
"""

import pytest
import torch
from many_models import DEVICE, MODELS, error_of, exact, measure, normal
from torch.optim.sgd import sgd

from kr_fast.models import classifier
from kr_fast.ops.batched.model_sgd import model_sgd

DECAY = 5e-4


def sizes_and_decays():
    parameters = list(classifier("resnet20", num_classes=10, in_channels=3).parameters())
    return [p.numel() for p in parameters], [DECAY if p.ndim > 1 else 0.0 for p in parameters]


def ours(weight, velocity, grad, rate, momentum, sizes, decays):
    return lambda: model_sgd(weight, velocity, grad, rate, momentum, sizes, decays)


def stacks(flat, sizes):
    return [part.view(MODELS, -1) for part in flat.split([MODELS * size for size in sizes])]


def eager(weight, velocity, grad, rate, momentum, sizes, decays, wrap=lambda step: step):
    tensors = list(zip(*(stacks(each, sizes) for each in (weight, velocity, grad)), decays, strict=True))

    @wrap
    def step():
        for w, v, g, decay in tensors:
            g = g + decay * w
            v.mul_(momentum[:, None]).add_(g)
            w.sub_(rate[:, None] * (g + momentum[:, None] * v))

    return step


def compiled(*arguments):
    torch._dynamo.reset()
    return eager(*arguments, wrap=torch.compile)


def optimizer(weight, velocity, grad, rate, momentum, sizes, decays):
    """Weights with and without decay are two groups of each model."""
    tensors = list(zip(*(stacks(each, sizes) for each in (weight, velocity, grad)), decays, strict=True))
    rates, momenta = rate.tolist(), momentum.tolist()

    def step():
        for m in range(MODELS):
            for decay in (0.0, DECAY):
                w, v, g = ([each[i][m] for each in tensors if each[3] == decay] for i in range(3))
                options = {"weight_decay": decay, "momentum": momenta[m], "lr": rates[m], "dampening": 0.0}
                sgd(w, g, v, foreach=True, nesterov=True, maximize=False, **options)

    return step


PROVIDERS = {"kr_fast": ours, "eager": eager, "compile": compiled, "optimizer": optimizer}


@pytest.mark.parametrize("provider", PROVIDERS)
@torch.no_grad()
def test_step(benchmark, provider):
    sizes, decays = sizes_and_decays()
    count = MODELS * sum(sizes)
    benchmark.group = f"model_sgd, {MODELS} x {sum(sizes)} numbers, {len(sizes)} parameters"
    weight, velocity, grad = (normal(count, dtype=torch.float32, seed=seed) for seed in range(3))
    rate = torch.linspace(0.01, 0.1, MODELS, device=DEVICE)
    rest = (grad, rate, torch.linspace(0.8, 0.9, MODELS, device=DEVICE), sizes, decays)
    expected, results = (weight.clone(), velocity.clone()), (weight.clone(), velocity.clone())
    exact(ours(*expected, *rest))
    PROVIDERS[provider](*results, *rest)()
    error = error_of(results, expected)
    assert error < 1e-6
    measure(benchmark, PROVIDERS[provider](weight, velocity, *rest), moved=20 * count, error=error)
