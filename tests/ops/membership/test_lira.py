"""The LiRA op against brute force: every target with its own list of shadows, in float64 numpy.

Model counts: 4 smallest for leave-one-out; 9 odd, so that sides are odd and even; 64 usual. Examples: 1; 127, 128, 129
around a block of 128.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from kr_fast.backends import registry
from kr_fast.ops.membership.lira import lira

BACKENDS = ("cpu", "reference")
VARIANTS = [
    (variant, variance)
    for variant in ("online", "offline")
    for variance in ("per_example", "fixed", "fixed_raw", "shrinkage")
]


def log_density(x, mean, deviation):
    return -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)


def oracle(phi, keep, online, variance, target=None):
    """(scores, pairs without shadows): target by target, example by example, query by query."""
    phi, keep = phi.double().numpy(), keep.numpy()
    queries, examples, models = phi.shape
    count = models if target is None else target.shape[2]
    scores, lacking = np.zeros((count, examples)), 0
    for k in range(count):
        others = [m for m in range(models) if target is not None or m != k]
        value = phi[:, :, k] if target is None else target[:, :, k].double().numpy()
        side = {s: [[m for m in others if keep[m, n] == s] for n in range(examples)] for s in (True, False)}
        pooled = {}
        for s in (True, False):
            parts = [phi[a, n, side[s][n]] for a in range(queries) for n in range(examples) if side[s][n]]
            residuals = np.concatenate([part - np.median(part) for part in parts]) if parts else np.zeros(1)
            pooled[s] = np.sqrt(np.mean(residuals**2))
            if variance == "fixed_raw":
                pooled[s] = np.std(np.concatenate(parts)) if parts else 0.0
        for n in range(examples):
            least = 2 if variance == "per_example" else 1
            if len(side[False][n]) < least or (online and len(side[True][n]) < least):
                lacking += 1
                continue
            for a in range(queries):
                x, found = value[a, n], {}
                for s in (True, False):
                    part = phi[a, n, side[s][n]]
                    if s and not online:
                        continue
                    centre, count = np.median(part), len(part)
                    spread = np.std(part) if variance == "per_example" else pooled[s]
                    if variance == "shrinkage":
                        total = 8 * pooled[s] ** 2 + np.sum((part - centre) ** 2)
                        spread = np.sqrt(total / (8 + count) * (1 + 1 / count)) + 1e-30
                        found[s] = student_t.logpdf(x, 8 + count, centre, spread)
                    else:
                        spread += 1e-30
                        found[s] = log_density(x, centre, spread)
                scores[k, n] += (found[True] - found[False] if online else (x - centre) / spread) / queries
    return torch.from_numpy(scores), lacking


def make(queries, examples, models, seed=0, balanced=True):
    generator = torch.Generator().manual_seed(seed)
    if balanced:
        keep = torch.rand(models, examples, generator=generator).argsort(0).argsort(0) < models // 2
    else:
        keep = torch.rand(models, examples, generator=generator) < 0.5
    phi = 2 * torch.randn(queries, examples, models, generator=generator) + 3 * keep.T + 5
    return phi, keep


def compare(found, wanted):
    assert torch.allclose(found[0], wanted[0], rtol=1e-9, atol=1e-9), float((found[0] - wanted[0]).abs().max())
    assert found[1] == wanted[1]


@pytest.mark.parametrize(("variant", "variance"), VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 1, 6), (1, 129, 9), (2, 40, 16)])
def test_leave_one_out(variant, variance, backend, shape):
    phi, keep = make(*shape)
    with registry.forced(backend):
        found = lira(phi, keep, variant=variant, variance=variance)
    compare(found, oracle(phi, keep, variant == "online", variance))
    assert found[0].dtype == torch.float64
    assert found[0].shape == (shape[2], shape[1])


@pytest.mark.parametrize(("variant", "variance"), VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_targets(variant, variance, backend):
    phi, keep = make(2, 37, 8)
    target = torch.randn(2, 37, 3) + 6
    with registry.forced(backend):
        found = lira(phi, keep, variant=variant, variance=variance, target=target)
    compare(found, oracle(phi, keep, variant == "online", variance, target))


@pytest.mark.parametrize(("variant", "variance"), VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_examples_without_shadows_are_counted_and_score_zero(variant, variance, backend):
    phi, keep = make(2, 12, 8, balanced=False)
    keep[:, 0], keep[:, 1] = True, False  # in every model, in none
    keep[:, 2], keep[:, 3] = True, False
    keep[0, 2], keep[0, 3] = False, True  # one on a side, none once it is the target
    with registry.forced(backend):
        found = lira(phi, keep, variant=variant, variance=variance)
    compare(found, oracle(phi, keep, variant == "online", variance))
    assert found[1] > 0
    assert bool((found[0][:, 0] == 0).all())  # no OUT shadow: no evidence


@pytest.mark.parametrize(("variant", "variance"), VARIANTS)
def test_ties_and_outliers(variant, variance):
    """Many equal values, and a far one whose removal must not leave rounding noise as a variance."""
    generator = torch.Generator().manual_seed(3)
    _, keep = make(1, 60, 12)
    phi = torch.randint(0, 3, (1, 60, 12), generator=generator).float() / 4
    phi[0, :20, 3] = 9e5
    found, wanted = (
        lira(phi, keep, variant=variant, variance=variance),
        oracle(phi, keep, variant == "online", variance),
    )
    usual = wanted[0].abs() < 1e20  # all equal on a side: the deviation is the 1e-30 that is added
    assert torch.allclose(found[0][usual], wanted[0][usual], rtol=1e-6, atol=1e-6)
    assert bool((found[0][~usual].sign() == wanted[0][~usual].sign()).all())


def test_infinite_signals_are_ordered_above_finite_ones():
    phi, keep = make(1, 30, 8)
    target = torch.full((1, 30, 2), 12.0)
    target[0, :, 1] = torch.inf
    scores, _ = lira(phi, keep, variant="offline", variance="fixed", target=target)
    assert bool(torch.isfinite(scores).all())
    assert bool((scores[1] > scores[0]).all())


@pytest.mark.parametrize("variance", ["per_example", "fixed"])
def test_order_of_models_does_not_matter(variance):
    phi, keep = make(2, 50, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    plain, _ = lira(phi, keep, variance=variance)
    mixed, _ = lira(phi[:, :, order], keep[order], variance=variance)
    assert torch.allclose(mixed, plain[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("examples", [127, 128, 129, 1000])
def test_bits_do_not_depend_on_threads(by_threads, examples):
    phi, keep = make(2, examples, 8)
    found = by_threads(lambda: lira(phi, keep, variance="fixed")[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_online_score_with_one_variance_ranks_as_the_closed_form():
    """With s_in = s_out the score ranks as (mu_in - mu_out)(2 phi - mu_in - mu_out), whatever s is."""
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(1, 1, 4, generator=generator)
    residual = torch.cat([residual, residual], 2)  # the same spread on both sides
    keep = torch.tensor([[True]] * 4 + [[False]] * 4).expand(8, 25)
    phi = residual + torch.rand(1, 25, 1, generator=generator) + 3 * keep.T
    target = 3 * torch.randn(1, 25, 1, generator=generator)
    scores = lira(phi, keep, variance="fixed", target=target)[0][0]
    inside, outside = phi[0, :, :4].double().quantile(0.5, 1), phi[0, :, 4:].double().quantile(0.5, 1)
    closed = (inside - outside) * (2 * target[0, :, 0] - inside - outside)
    assert torch.equal(scores.argsort(), closed.argsort())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(6, 14), st.sampled_from(VARIANTS), st.integers(0, 2**31))
def test_any_shape(queries, examples, models, kind, seed):
    phi, keep = make(queries, examples, models, seed)
    found = lira(phi, keep, variant=kind[0], variance=kind[1])
    compare(found, oracle(phi, keep, kind[0] == "online", kind[1]))


def test_inputs_may_have_any_strides_and_stay_unchanged():
    phi, keep = make(2, 20, 8)
    plain, _ = lira(phi, keep)
    turned, flipped = phi.permute(2, 1, 0).contiguous().permute(2, 1, 0), keep.T.contiguous().T
    copies = turned.clone(), flipped.clone()
    assert torch.equal(lira(turned, flipped)[0], plain)
    assert torch.equal(turned, copies[0])
    assert torch.equal(flipped, copies[1])


PHI, KEEP = make(1, 5, 6)


@pytest.mark.parametrize(
    ("phi", "keep", "options", "error", "words"),
    [
        (PHI[0], KEEP, {}, ValueError, "phi must have 3 dimensions"),
        (PHI, KEEP.float(), {}, TypeError, "keep must be bool"),
        (PHI, KEEP.T, {}, ValueError, r"keep must have shape \[M, N\] = \[6, 5\]"),
        (PHI, KEEP, {"variant": "both"}, ValueError, "variant must be one of online, offline"),
        (
            PHI,
            KEEP,
            {"variance": "global"},
            ValueError,
            "variance must be one of per_example, fixed, fixed_raw, shrinkage",
        ),
        (PHI, KEEP, {"target": PHI[:, :3]}, ValueError, r"target must have shape \[1, 5, K\]"),
        (PHI[:0], KEEP, {}, ValueError, "phi must hold at least one query"),
        (PHI * torch.nan, KEEP, {}, ValueError, "phi must not hold NaN"),
        (PHI, KEEP, {"target": PHI * torch.nan}, ValueError, "target must not hold NaN"),
        (PHI[:, :, :4], KEEP[[0, 1, 2, 3]] ^ KEEP[[0, 1, 2, 3]], {}, ValueError, "shadows in of it"),
        (PHI[:, :, :2], torch.tensor([[True], [False]]).expand(2, 5), {"variance": "fixed"}, ValueError, "2 shadows"),
        (
            PHI[:, :, :4],
            torch.tensor([[True], [True], [False], [False]]).expand(4, 5),
            {},
            ValueError,
            "3 shadows out of it for per_example variance, got 2",
        ),
    ],
)
def test_bad_input(phi, keep, options, error, words):
    with pytest.raises(error, match=f"lira: .*{words}"):
        lira(phi, keep, **options)
