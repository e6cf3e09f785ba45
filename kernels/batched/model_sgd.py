"""Triton kernel of model_sgd: 20 bytes a weight, one launch for all parameters of all models.

A program takes BLOCK numbers of one parameter; a table made once per layout says which. The model of a number is its
position in the parameter's stack divided by the parameter's size.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def step(weight, velocity, grad, rate, momentum, table, decays, BLOCK: tl.constexpr):
    row = table + tl.program_id(0) * 5
    first, end, start = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    at = first + tl.arange(0, BLOCK)
    live = at < end
    model = (at - start) // tl.load(row + 3)
    lr = tl.load(rate + model, mask=live, other=0.0)
    mu = tl.load(momentum + model, mask=live, other=0.0)
    live = live & (lr != 0)
    w = tl.load(weight + at, mask=live, other=0.0)
    g = tl.load(grad + at, mask=live, other=0.0) + tl.load(decays + tl.load(row + 4)) * w
    v = mu * tl.load(velocity + at, mask=live, other=0.0) + g
    tl.store(velocity + at, v, mask=live)
    tl.store(weight + at, w - lr * (g + mu * v), mask=live)


def layout(models: int, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device):
    """int64 ``[programs, 5]``: first number, end, start and size of the parameter, its index; and the decays."""
    rows, start = [], 0
    for index, size in enumerate(sizes):
        end = start + models * size
        rows += [[first, min(first + BLOCK, end), start, size, index] for first in range(start, end, BLOCK)]
        start = end
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    return table, torch.tensor(decays, dtype=torch.float32).to(device)


def model_sgd(call, table, decays):
    """See kr_fast.ops.batched.model_sgd; arguments are checked there. ``table`` and ``decays`` are :func:`layout`'s."""
    if call.weight.numel():
        tensors = (call.weight, call.velocity, call.grad, call.rate, call.momentum)
        step[(len(table),)](*tensors, table, decays, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
