"""Attack-R of all targets by one sort an example, against the comparison of every pair in torch.

The comparisons run for 2 of the targets: for all they take M / 2 times as long.
"""

import pytest
import torch

from kr_fast.ops.membership.attack_r import attack_r

COUNT, MODELS, QUERIES, SAMPLED = 50_000, 64, 2, 2


def pairs(phi, keep, targets):
    rows = []
    for k in targets:
        out = ~keep.T & (torch.arange(MODELS) != k)
        rows.append((((phi <= phi[:, :, k, None]) & out).sum(2) / out.sum(1).clamp_min(1)).double().mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("provider", ["pairs, 2 targets", "kr_fast"])
def test_attack_r(benchmark, provider):
    benchmark.group = f"attack_r N={COUNT} M={MODELS} A={QUERIES}"
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(MODELS, COUNT, generator=generator).argsort(0).argsort(0) < MODELS // 2
    phi = torch.randn(QUERIES, COUNT, MODELS, generator=generator) + 2 * keep.T
    assert torch.equal(attack_r(phi, keep)[:SAMPLED], pairs(phi, keep, range(SAMPLED)))
    if provider == "kr_fast":
        benchmark.pedantic(attack_r, (phi, keep), rounds=5, warmup_rounds=1)
    else:
        benchmark.pedantic(pairs, (phi, keep, range(SAMPLED)), rounds=3)
    benchmark.extra_info["targets"] = MODELS if provider == "kr_fast" else SAMPLED
    benchmark.extra_info["threads"] = torch.get_num_threads()
