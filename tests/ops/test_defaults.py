"""torch's default dtype and device are the user's: the compiled kernels' memory does not follow them."""

import contextlib

import pytest
import torch

import kr_fast
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.ops.nn.direct_conv2d import direct_conv2d
from kr_fast.ops.nn.group_norm_silu import group_norm_silu
from kr_fast.ops.nn.qkv_attention import qkv_attention
from kr_fast.ops.nn.reference import transforms
from kr_fast.training import SGD

LAST = torch.channels_last


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def inputs():
    """float32 on the CPU, made before the defaults are set."""
    torch.manual_seed(0)
    x = torch.randn(3, 16, 4, 4).contiguous(memory_format=LAST)
    return {
        "x": x,
        "weight": torch.randn(16, requires_grad=True),
        "bias": torch.randn(16, requires_grad=True),
        "filters": torch.randn(16, 16, 3, 3, requires_grad=True),
        "running": torch.zeros(2, 16),
        "qkv": torch.randn(2, 5, 48, requires_grad=True),
        "logits": torch.randn(6, 4),
        "labels": torch.arange(6) % 4,
    }


def results(x, weight, bias, filters, running, qkv, logits, labels):
    """What ops whose kernels write float32 beside their result give, and a step of an optimizer."""
    transforms.cache_clear()
    given = (weight, bias, filters, qkv)
    y = kr_fast.batch_norm_act(x, weight, bias, *running)
    y = y + group_norm_silu(x, 4, weight, bias) + direct_conv2d(x, filters, bias=bias, padding=1)
    y = y + kr_fast.winograd_conv2d(x, filters, bias=bias)
    attended = qkv_attention(qkv, 2)
    grads = torch.autograd.grad(y.square().sum() + attended.square().sum(), given)
    for each, grad in zip(given, grads, strict=True):
        each.grad = grad
    optimizer = SGD(given, 0.1, momentum=0.9)
    optimizer.step()
    signals = membership_signals(logits, labels, ("phi", "loss"))
    return [y, attended, running, *grads, *signals.values(), *(each.detach() for each in given)]


@pytest.mark.parametrize(
    "defaults",
    [lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16), lambda: torch.device("meta")],
    ids=["float64", "bfloat16", "another device"],
)
def test_results_do_not_follow_torchs_defaults(defaults):
    expected, given = results(**inputs()), inputs()
    with defaults():
        got = results(**given)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
