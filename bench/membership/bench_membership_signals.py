"""membership_signals, all six, against torch, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F

from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals

# 10 and 100: rows across lanes; 1000: row by row.
SHAPES = [(100_000, 10), (100_000, 100), (20_000, 1000)]


def eager(logits, labels):
    """What a script would write, with the care for digits where p is near 1 that the definition asks for."""
    at, log_p = labels[:, None], logits.log_softmax(1)
    p = log_p.exp()
    phi = logits.gather(1, at)[:, 0] - logits.scatter(1, at, float("-inf")).logsumexp(1)
    loss, first = F.softplus(-phi), logits.argmax(1, keepdim=True)
    rest = torch.log1p(-p.clamp_max(0.5))
    rest = rest.scatter(1, first, log_p.scatter(1, first, float("-inf")).logsumexp(1, keepdim=True))
    others = (p * rest).scatter(1, at, 0.0).sum(1)
    modified = (1 - p.gather(1, at)[:, 0]) * loss - others
    return [phi, loss, -(p * log_p).sum(1), modified, (-loss).exp(), (first == at)[:, 0].to(logits.dtype)]


def fused(logits, labels):
    return list(membership_signals(logits, labels, SIGNALS).values())


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("provider", ["eager", "compiled", "kr_fast"])
def test_membership_signals(benchmark, shape, provider):
    benchmark.group = f"membership_signals {shape[0]}x{shape[1]} cpu"
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    run = {"eager": eager, "compiled": torch.compile(eager), "kr_fast": fused}[provider]
    # Right first: against the same in float64.
    for ours, exact in zip(run(logits, labels), eager(logits.double(), labels), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-3)
    benchmark.pedantic(run, (logits, labels), rounds=10, iterations=1, warmup_rounds=3)
