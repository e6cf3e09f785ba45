"""Gradients of one layer of many models in training: input, weight and bias.

``loop``: the library's backward, model by model; ``compile``: that loop through torch.compile; ``grouped``: models as
groups of channels. bfloat16, the weights of all rounded beforehand; kr_fast's gradients of weights are float32.
"""

import pytest
import torch
from many_models import IMAGES, LAYERS, MODELS, error_of, exact, layer_inputs, measure, normal

import kr_fast.ops.batched.model_conv2d  # noqa: F401  (registers the op)


def ours(grad, x, weight, stride):
    op, geometry = torch.ops.kr_fast.model_conv2d_backward, ([stride] * 2, [1, 1], [1, 1], 1)
    return lambda: op(grad, x, weight, *geometry, [True] * 3)


def library(grad, x, weight, stride, groups=1):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [True] * 3
    )


def loop(grad, x, weight, stride):
    grad, x, weight = (each.permute(0, 1, 4, 2, 3) for each in (grad, x, weight))

    def run():
        dx, dw, db = zip(*(library(grad[m], x[m], weight[m], stride) for m in range(MODELS)), strict=True)
        dx, dw, db = torch.stack(dx), torch.stack(dw), torch.stack(db)
        return dx.movedim(2, -1), dw.movedim(2, -1), db

    return run


def compiled(grad, x, weight, stride):
    torch._dynamo.reset()
    return torch.compile(loop(grad, x, weight, stride))


def grouped(grad, x, weight, stride):
    join = lambda each: each.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)  # noqa: E731
    grad, x, weight = join(grad), join(x), weight.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()

    def run():
        dx, dw, db = library(grad, x, weight, stride, MODELS)
        dx = dx.unflatten(1, (MODELS, -1)).permute(1, 0, 3, 4, 2)
        return dx, dw.unflatten(0, (MODELS, -1)).permute(0, 1, 3, 4, 2), db.view(MODELS, -1)

    return run


PROVIDERS = {"kr_fast": ours, "loop": loop, "compile": compiled, "grouped": grouped}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", PROVIDERS)
@torch.no_grad()
def test_gradients(benchmark, layer, provider):
    side, channels, outputs, _ = LAYERS[layer]
    benchmark.group = (
        f"model_conv2d_backward, {layer}: {MODELS} x {IMAGES} images {side}x{side}, {channels} to {outputs}"
    )
    x, weight, _, stride = layer_inputs(layer, torch.bfloat16)
    pixels = (side + stride - 1) // stride
    grad = normal(MODELS, IMAGES, pixels, pixels, outputs, dtype=torch.bfloat16, seed=3)
    run = PROVIDERS[provider](grad, x, weight, stride)
    error = error_of(run(), exact(ours(grad, x, weight, stride)))
    assert error < 0.02
    moved = 2 * (2 * x.numel() + grad.numel() + weight.numel()) + 4 * weight.numel()
    measure(benchmark, run, moved=moved, flop=2 * 2 * grad.numel() * 9 * channels, error=error)
