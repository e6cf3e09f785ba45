"""residual_block against torch's modules, forward and all gradients, eager in both layouts and compiled."""

import copy

import pytest
import torch

import kr_fast
from kr_fast.models.resnet import Block

LAST = torch.channels_last
# N, inputs, outputs, side, stride: the blocks of a ResNet-14 of width 16 at 28 pixels, and the first at 8.
CASES = [
    (64, 16, 16, 28, 1),
    (64, 16, 32, 28, 2),
    (64, 32, 32, 14, 1),
    (64, 32, 64, 14, 2),
    (64, 64, 64, 7, 1),
    (64, 16, 16, 8, 1),
]


def block_of(provider, block):
    block = copy.deepcopy(block)
    if provider == "eager_nchw":
        return block
    block.to(memory_format=LAST)
    if provider == "kr_fast":
        kr_fast.optimize(block, training=True)
    return torch.compile(block, dynamic=False) if provider == "compile_nhwc" else block


@pytest.mark.parametrize("provider", ["kr_fast", "eager_nhwc", "eager_nchw", "compile_nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_block(benchmark, threads, case, provider):
    batch, inputs, outputs, side, stride = case
    benchmark.group = f"residual_block {case} {threads} threads"
    torch.manual_seed(0)
    block, x = Block(inputs, outputs, stride).train(), torch.randn(batch, inputs, side, side).relu()
    grad = torch.randn(block(x).shape)
    torch.empty(31 << 18)  # freed: from now on the process keeps blocks of up to 31 MB
    torch._dynamo.reset()

    def gradients(block, x, grad):
        x = x.detach().requires_grad_()

        def run():
            return torch.autograd.grad(block(x), [x, *block.parameters()], grad)

        return run

    layout = torch.contiguous_format if provider == "eager_nchw" else LAST
    run = gradients(block_of(provider, block), *(each.contiguous(memory_format=layout) for each in (x, grad)))
    exact = gradients(copy.deepcopy(block).double(), x.double(), grad.double())
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(run(), exact(), strict=True))
    assert error < 1e-2  # roundings that move activations over the corner of a ReLU
    benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, rounds=30, warmup_rounds=5)
