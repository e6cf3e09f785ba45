"""model_sgd: torch's SGD a model, models that stand still, arguments."""

import pytest
import torch
from backends import on_backends

from kr_fast.ops.batched.model_sgd import model_sgd

# A number; a block of the kernel and one more a model; three models end within a block.
SIZES, DECAYS, MODELS = [1, 1025, 40, 300], [0.0, 0.1, 0.0, 0.1], 3


def run(dtype, device="cpu", steps=4):
    """Weights and velocities after some steps in which model 1 stands still twice, and what torch makes of them."""
    generator = torch.Generator().manual_seed(0)
    total = MODELS * sum(SIZES)
    weight = torch.randn(total, generator=generator, dtype=torch.float64)
    apart = [part.view(MODELS, -1).clone() for part in weight.split([MODELS * size for size in SIZES])]
    weight, velocity = weight.to(device, dtype), torch.zeros(total, dtype=dtype, device=device)
    mine = [[torch.nn.Parameter(part[m].clone()) for part in apart] for m in range(MODELS)]
    groups = [
        [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, DECAYS, strict=True)]
        for parameters in mine
    ]
    optimizers = [torch.optim.SGD(each, lr=1.0, momentum=0.9, nesterov=True) for each in groups]
    for step in range(steps):
        grad = torch.randn(total, generator=generator, dtype=torch.float64)
        rate = torch.tensor([0.1, 0.0 if step % 2 else 0.2, 0.05 * (step + 1)], dtype=torch.float64)
        momentum = torch.tensor([0.9, 0.8, 0.95 - 0.1 * step], dtype=torch.float64)
        parts = [part.view(MODELS, -1) for part in grad.split([MODELS * size for size in SIZES])]
        for m in range(MODELS):
            if rate[m] == 0:
                continue
            for group in optimizers[m].param_groups:
                group.update(lr=float(rate[m]), momentum=float(momentum[m]))
            for p, part in zip(mine[m], parts, strict=True):
                p.grad = part[m].clone()
            optimizers[m].step()
        if step % 2:  # a model that stands still does so whatever its gradient
            grad = torch.cat([torch.where(torch.arange(MODELS)[:, None] == 1, torch.nan, p).flatten() for p in parts])
        given = (each.to(device, dtype) for each in (grad, rate, momentum))
        model_sgd(weight, velocity, *given, SIZES, DECAYS)
    want = torch.cat([torch.stack([own[i].detach() for own in mine]).flatten() for i in range(len(SIZES))])
    speed = torch.cat(
        [
            torch.stack([o.state[own[i]]["momentum_buffer"] for o, own in zip(optimizers, mine, strict=True)]).flatten()
            for i in range(len(SIZES))
        ]
    )
    return (weight, want), (velocity, speed)


@on_backends("model_sgd")
def test_steps_are_torchs(backend):
    for got, want in run(torch.float32, backend.device):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_steps_are_torchs_in_float64():
    for got, want in run(torch.float64):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_op_passes_torchs_checks():
    weight, velocity, grad = torch.randn(3, 10).unbind()
    arguments = (weight.clone(), velocity.clone(), grad.clone(), torch.rand(2), torch.rand(2), [2, 3], [0.1, 0.0])
    torch.library.opcheck(torch.ops.kr_fast.model_sgd, arguments)


def test_arguments():
    weight, pair = torch.zeros(10), torch.zeros(2)
    for arguments, words in [
        ((torch.zeros(9), weight, weight, pair, pair, [2, 3], [0, 0]), r"weight must be contiguous \[10\]"),
        ((weight, torch.zeros(9), weight, pair, pair, [2, 3], [0, 0]), r"velocity must be contiguous \[10\]"),
        ((weight, weight, weight, pair, torch.zeros(3), [2, 3], [0, 0]), r"momentum must be contiguous \[2\]"),
        ((weight, weight, weight, pair, pair, [2, 3], [0]), "decays must hold 2 numbers"),
        ((weight.clone().requires_grad_(), weight, weight, pair, pair, [2, 3], [0, 0]), "weight must not require grad"),
    ]:
        with pytest.raises(ValueError, match=f"model_sgd: {words}"):
            model_sgd(*arguments)
    with pytest.raises(TypeError, match="weight must be float32 or float64"):
        model_sgd(weight.detach().half(), weight, weight, pair, pair, [2, 3], [0, 0])
