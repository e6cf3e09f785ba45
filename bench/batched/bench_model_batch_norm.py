"""BatchNorm in training with the residual sum and the ReLU behind it, forward and backward, of many models.

``loop``: torch's, model by model; ``grouped``: torch's once, with models as more channels; ``compile``: the grouped one
through torch.compile. bfloat16, weight and bias in float32; every row ends with the gradients of x, weight, bias and
residual.
"""

import pytest
import torch
import torch.nn.functional as F
from many_models import IMAGES, MODELS, error_of, exact, measure, normal

from kr_fast.ops.batched.model_batch_norm import model_batch_norm

# pixels on a side, channels
SIZES = {
    "resnet20 stage 1": (32, 16),
    "resnet20 stage 2": (16, 32),
    "resnet20 stage 3": (8, 64),
    "wrn-28-2 stage 3": (8, 128),
    "resnet18 stage 1": (32, 64),
}


def stepped(forward, inputs, grad, back=lambda each: each):
    """``run() -> (y, *gradients)`` of ``forward(*inputs)``; ``back`` gives images their layout again."""

    def run():
        y = forward(*inputs)
        dx, dw, db, residual = torch.autograd.grad(y, inputs, grad)
        return back(y.detach()), back(dx), dw.view(MODELS, -1), db.view(MODELS, -1), back(residual)

    return run


def ours(inputs, grad):
    return stepped(lambda *tensors: model_batch_norm(*tensors, relu=True)[0], inputs, grad)


def normed(x, weight, bias, residual):
    return (F.batch_norm(x, None, None, weight, bias, training=True) + residual).relu()


def loop(inputs, grad):
    def forward(x, weight, bias, residual):
        x, residual = x.movedim(-1, 2), residual.movedim(-1, 2)
        return torch.stack([normed(x[m], weight[m], bias[m], residual[m]) for m in range(MODELS)]).movedim(2, -1)

    return stepped(forward, inputs, grad)


def grouped(inputs, grad, forward=normed):
    """Images ``[N, M * C, H, W]``, channels_last."""
    join = lambda each: each.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, weight, bias, residual = inputs
    tensors = [join(x), weight.flatten(), bias.flatten(), join(residual)]
    tensors = [each.detach().requires_grad_() for each in tensors]
    return stepped(forward, tensors, join(grad), lambda y: y.unflatten(1, (MODELS, -1)).permute(1, 0, 3, 4, 2))


def compiled(inputs, grad):
    torch._dynamo.reset()
    return grouped(inputs, grad, torch.compile(normed))


PROVIDERS = {"kr_fast": ours, "loop": loop, "compile": compiled, "grouped": grouped}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark, name, provider):
    side, channels = SIZES[name]
    benchmark.group = f"model_batch_norm, {name}: {MODELS} x {IMAGES} images {side}x{side}, {channels} channels"
    size = (MODELS, IMAGES, side, side, channels)
    x, residual, grad = (normal(*size, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight, bias = (normal(MODELS, channels, dtype=torch.float32, seed=seed) for seed in (3, 4))
    inputs = [each.requires_grad_() for each in (x, weight, bias, residual)]
    run = PROVIDERS[provider](inputs, grad)
    y, *gradients = run()
    expected_y, *expected = exact(ours(inputs, grad))
    error = error_of([y], [expected_y])
    assert error < 0.02
    # A sum that rounds to the other side of 0 has another gradient, so gradients agree on the whole.
    for a, b in zip(gradients, expected, strict=True):
        assert float((a.float() - b.float()).norm()) < 0.1 * float(b.float().norm())
    measure(benchmark, run, moved=2 * 8 * x.numel(), error=error)  # x, residual, y; grad, x, y, and two gradients
