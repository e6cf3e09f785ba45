"""Attack-R's shares: counts by one sort equal to the comparisons of every pair, whatever the ties and infinities.

N: 1, and 127 to 129 around a block of 128 examples. M: 2 (one shadow is left) to 33. A: 1, 3.
"""

import math

import pytest
import torch
from backends import on_backends

from kr_fast.ops.membership.attack_r import attack_r


def make(queries, examples, models, dtype=torch.float32, kind="distinct", outside=2):
    g = torch.Generator().manual_seed(models)
    phi, target = (torch.randn(queries, examples, n, generator=g, dtype=torch.float64) for n in (models, outside))
    keep = torch.rand(models, examples, generator=g) < 0.5
    keep[:, 0] = True  # no shadow without this example
    if kind == "ties":
        phi, target = phi.round(), target.round()
    if kind == "infinite":
        phi.view(-1)[::3], phi.view(-1)[1::5], target[:, ::2] = math.inf, -math.inf, math.inf
    return phi.to(dtype), keep, target.to(dtype)


def pairs(phi, keep, target):
    """By definition: every shadow compared with every target."""
    queries, examples, models = phi.shape
    result = torch.zeros(models if target is None else target.shape[2], examples, dtype=torch.float64)
    for k in range(len(result)):
        for n in range(examples):
            others = [m for m in range(models) if not keep[m, n] and (target is not None or m != k)]
            for a in range(queries):
                x = float((phi if target is None else target)[a, n, k])
                count = sum(float(phi[a, n, m]) <= x for m in others)
                result[k, n] += float(torch.tensor(count, dtype=torch.float32) / max(len(others), 1))
    return result / queries


@on_backends("attack_r")
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
@pytest.mark.parametrize(("queries", "examples", "models"), [(1, 1, 2), (1, 129, 5), (3, 127, 4), (1, 20, 33)])
def test_shares(backend, kind, queries, examples, models):
    phi, keep, target = make(queries, examples, models, kind=kind)
    for outside in (None, target):
        share = attack_r(phi, keep, target=outside)
        assert torch.allclose(share, pairs(phi, keep, outside), rtol=0, atol=1e-15)


def test_doubles_are_not_rounded():
    """A difference that float32 does not see, and a target of another dtype than its shadows."""
    phi = torch.tensor([[[1.0, 1 + 1e-12, 1 - 1e-12, 1.0]]], dtype=torch.float64)
    keep = torch.zeros(4, 1, dtype=torch.bool)
    assert attack_r(phi, keep)[:, 0].tolist() == pytest.approx([2 / 3, 1.0, 0.0, 2 / 3], abs=1e-7)
    assert attack_r(phi, keep, target=torch.ones(1, 1, 1))[0, 0] == 0.75


def test_bits_do_not_depend_on_threads(by_threads):
    phi, keep, _ = make(2, 700, 16)
    result = by_threads(lambda: attack_r(phi, keep))
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_inputs_of_any_layout_are_left_alone():
    phi, keep, target = make(2, 40, 6)
    copies = phi.clone(), keep.clone(), target.clone()
    expected = attack_r(phi, keep, target=target)
    turned = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in (phi, keep, target)]
    assert torch.equal(attack_r(turned[0], turned[1], target=turned[2]), expected)
    assert all(torch.equal(a, b) for a, b in zip(copies, (phi, keep, target), strict=True))
    assert attack_r(phi[:, :0], keep[:, :0]).shape == (6, 0)


PHI, KEEP = torch.zeros(1, 3, 2), torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attack_r(PHI[0], KEEP), "phi must have"),
        (lambda: attack_r(PHI.long(), KEEP), "phi must be float32 or"),
        (lambda: attack_r(PHI, KEEP.T), r"keep must have shape \[M, N\] = \[2, 3\]"),
        (lambda: attack_r(PHI, KEEP.long()), "keep must be bool"),
        (lambda: attack_r(PHI[:0], KEEP), "phi must hold at least one query"),
        (lambda: attack_r(PHI * math.nan, KEEP), "phi must not hold NaN"),
        (lambda: attack_r(PHI, KEEP, target=PHI[:, :2]), r"target must have shape \[1, 3, K\]"),
        (lambda: attack_r(PHI, KEEP, target=PHI * math.nan), "target must not hold NaN"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((ValueError, TypeError), match=f"attack_r: {words}"):
        call()
