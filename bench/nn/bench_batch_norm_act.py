"""batch_norm_act against torch's layers one after the other, eager in both layouts and compiled.

``forward`` updates the running statistics; ``both`` is forward and all gradients. Everyone gets the tensors in its own
layout before the clock starts, and memory that the process already has: blocks of this size are otherwise returned to
the system and taken from it again at every call, which costs all of them more than the arithmetic.
"""

import pytest
import torch
import torch.nn.functional as F

import kr_fast

LAST = torch.channels_last
# The layers of a ResNet-14 of width 16 at 28 pixels and the first at 8; 13 MB, which no cache of one core holds.
CASES = [(64, 16, 28, 28), (64, 32, 14, 14), (64, 64, 7, 7), (64, 16, 8, 8), (64, 64, 28, 28)]
PROVIDERS = ["kr_fast", "eager_nhwc", "eager_nchw", "compile_nhwc"]


def layers(x, weight, bias, mean, var, residual):
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    return F.relu(y if residual is None else y + residual, inplace=True)


def ours(x, weight, bias, mean, var, residual):
    return kr_fast.batch_norm_act(x, weight, bias, mean, var, residual=residual)


def runs(provider, inputs, grad):
    """(forward, forward and backward) without arguments; the second returns y and the gradients."""
    layout = torch.contiguous_format if provider == "eager_nchw" else LAST
    inputs = [each if each is None or each.ndim == 1 else each.contiguous(memory_format=layout) for each in inputs]
    x, weight, bias, residual = (None if each is None else each.detach().requires_grad_() for each in inputs)
    needed, grad = (
        [each for each in (x, weight, bias, residual) if each is not None],
        grad.contiguous(memory_format=layout),
    )
    running = torch.zeros_like(bias), torch.ones_like(bias)
    torch._dynamo.reset()
    function = {"kr_fast": ours, "compile_nhwc": torch.compile(layers, dynamic=False)}.get(provider, layers)

    def forward():
        return function(x, weight, bias, *running, residual)

    def both():
        y = forward()
        return y, *torch.autograd.grad(y, needed, grad)

    return forward, both


def mean_error(got, exact):
    """The worst of the mean errors, each relative to its mean: where y is 0 to rounding, a gradient is 0 or not."""
    return max(float((a.double() - b).abs().mean() / b.abs().mean()) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_act(benchmark, threads, case, residual, part, provider):
    benchmark.group = f"batch_norm_act {case} {'residual ' if residual else ''}{part} {threads} threads"
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    inputs = [normal(*case), 1 + 0.1 * normal(case[1]), normal(case[1]), normal(*case) if residual else None]
    grad = normal(*case)
    torch.empty(31 << 18)  # freed: from now on the process keeps blocks of up to 31 MB
    _, exact = runs("eager_nchw", [None if each is None else each.double() for each in inputs], grad.double())
    forward, both = runs(provider, inputs, grad)
    error = mean_error(both(), exact())
    assert error < 1e-3  # torch's in channels_last: 3e-4
    size = grad.numel() * 4
    # Forward reads x twice and writes y; backward reads g and x twice and writes dx. A residual is read, and the
    # gradient behind the ReLU is made of y and written once.
    moved = size * ((3 + residual) + (part == "both") * (5 + 2 * residual))
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark.pedantic(forward if part == "forward" else both, rounds=30, iterations=3, warmup_rounds=5)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["gb_per_second"] = moved / benchmark.stats.stats.min / 1e9
