"""preactivation_block against torch's layers, forward and all gradients, eager in both layouts and compiled."""

import pytest
import torch
import torch.nn.functional as F

import kr_fast

LAST = torch.channels_last
# N, channels of x and of the skip connection, outputs, side: levels of the digits UNet and of that at 28 pixels.
CASES = [(128, 32, 0, 32, 8), (128, 64, 32, 32, 8), (128, 64, 64, 64, 4), (64, 32, 0, 32, 28), (64, 64, 64, 64, 14)]
GROUPS = 8


def layers(x, skip, shift, w1, b1, f1, c1, w2, b2, f2, c2, shortcut, bias):
    u = x if skip is None else torch.cat([x, skip], 1)
    h = F.conv2d(F.silu(F.group_norm(u, GROUPS, w1, b1)), f1, c1, padding=1) + shift[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, GROUPS, w2, b2)), f2, c2, padding=1)
    return h + (u if shortcut is None else F.conv2d(u, shortcut, bias))


def ours(x, skip, shift, w1, b1, f1, c1, w2, b2, f2, c2, shortcut, bias):
    norms, shortcut = [(GROUPS, w1, b1, 1e-5), (GROUPS, w2, b2, 1e-5)], None if shortcut is None else (shortcut, bias)
    return kr_fast.preactivation_block(x, norms, [(f1, c1), (f2, c2)], skip=skip, shift=shift, shortcut=shortcut)


def draw(case):
    n, first, second, outputs, side = case
    channels, normal = first + second, torch.randn
    tensors = [normal(n, first, side, side), normal(n, second, side, side) if second else None, normal(n, outputs)]
    for inputs in (channels, outputs):
        filters = normal(outputs, inputs, 3, 3) / (3 * inputs**0.5)
        tensors += 1 + 0.1 * normal(inputs), normal(inputs), filters, normal(outputs)
    tensors += [normal(outputs, channels, 1, 1), normal(outputs)] if channels != outputs else [None, None]
    return tensors, normal(n, outputs, side, side)


@pytest.mark.parametrize("provider", ["kr_fast", "eager_nhwc", "eager_nchw", "compile_nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_preactivation_block(benchmark, threads, case, provider):
    benchmark.group = f"preactivation_block {case} {threads} threads"
    torch.manual_seed(0)
    tensors, grad = draw(case)
    torch.empty(31 << 18)  # freed: from now on the process keeps blocks of up to 31 MB
    torch._dynamo.reset()
    function = ours if provider == "kr_fast" else layers
    function = torch.compile(function, dynamic=False) if provider.startswith("compile") else function
    layout = torch.contiguous_format if provider == "eager_nchw" else LAST

    def stepped(function, dtype, layout):
        given = [
            None if each is None else each.to(dtype, memory_format=layout if each.ndim == 4 else torch.preserve_format)
            for each in (*tensors, grad)
        ]
        learned = [None if each is None else each.detach().requires_grad_() for each in given[:-1]]
        asked = [each for each in learned if each is not None]
        return lambda: torch.autograd.grad(function(*learned), asked, given[-1])

    run, exact = stepped(function, torch.float32, layout), stepped(layers, torch.float64, torch.contiguous_format)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(run(), exact(), strict=True))
    assert error < 1e-4
    benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, rounds=30 if case[4] < 28 else 8, warmup_rounds=3)
