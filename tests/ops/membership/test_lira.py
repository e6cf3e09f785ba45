"""The LiRA op on every backend against brute force: every target with its own list of shadows, in float64 numpy."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from backends import on_backends
from cuda_on_host import in_use, machine
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from kr_fast.backends import registry
from kr_fast.ops.membership.lira import VARIANCES, VARIANTS, lira

METHODS = [(variant, variance) for variant in VARIANTS for variance in VARIANCES]


class Case(NamedTuple):
    """A shape, the kind of its numbers, and why it is there."""

    queries: int
    examples: int
    models: int
    reason: str
    kind: str = "distinct"
    targets: int = 0  # from outside; 0: each model is left out in turn
    tolerance: float = 1e-9  # beside brute force

    def __str__(self) -> str:
        return self.reason


CASES = (
    Case(2, 1, 6, "one example"),
    Case(1, 129, 9, "a block of 128 and one, sides of odd and even counts"),
    Case(2, 40, 16, "usual"),
    Case(2, 11, 6, "even sides, one of them empty", "unbalanced"),
    Case(2, 12, 9, "odd sides, one of them empty", "unbalanced"),
    Case(2, 11, 9, "ties of both signs", "ties", tolerance=1e-6),
    Case(2, 11, 6, "an outlier that leaves no rounding noise", "outlier", tolerance=1e-6),
    Case(1, 60, 12, "ties and an outlier", "both", tolerance=1e-6),
    Case(1, 3, 31, "a lane less than a warp"),
    Case(1, 3, 32, "a warp"),
    Case(1, 3, 33, "a lane more than a warp"),
    Case(1, 3, 70, "three steps of a warp"),
    Case(2, 37, 8, "targets from outside", targets=3),
    Case(1, 2, 8, "more targets than one launch takes", targets=1026),
)
# Both sides of unequal counts, several steps of a warp, and targets from outside: every access of the kernels.
SANITIZED = [case for case in CASES if case.kind == "unbalanced" or case.models == 70 or case.targets]
MARKED = [pytest.param(case, marks=pytest.mark.sanitize) if case in SANITIZED else case for case in CASES]


def log_density(x, mean, deviation):
    return -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)


def oracle(phi, keep, online, variance, target=None):
    """(scores, pairs without shadows): target by target, example by example, query by query."""
    phi, keep = phi.double().numpy(), keep.numpy()
    queries, examples, models = phi.shape
    count = models if target is None else target.shape[2]
    scores, num_unscored = np.zeros((count, examples)), 0
    for k in range(count):
        value = phi[:, :, k] if target is None else target[:, :, k].double().numpy()
        if target is None or k == 0:  # of models from outside none is left out
            others = [m for m in range(models) if target is not None or m != k]
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
                num_unscored += 1
                continue
            for a in range(queries):
                x, log_p = value[a, n], {}
                for s in (True, False):
                    part = phi[a, n, side[s][n]]
                    if s and not online:
                        continue
                    centre, count = np.median(part), len(part)
                    spread = np.std(part) if variance == "per_example" else pooled[s]
                    if variance == "shrinkage":
                        total = 8 * pooled[s] ** 2 + np.sum((part - centre) ** 2)
                        spread = np.sqrt(total / (8 + count) * (1 + 1 / count)) + 1e-30
                        log_p[s] = student_t.logpdf(x, 8 + count, centre, spread)
                    else:
                        spread += 1e-30
                        log_p[s] = log_density(x, centre, spread)
                scores[k, n] += (log_p[True] - log_p[False] if online else (x - centre) / spread) / queries
    return torch.from_numpy(scores), num_unscored


def make(queries, examples, models, kind="distinct", seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(models, examples, generator=generator).argsort(0).argsort(0) < models // 2
    phi = 2 * torch.randn(queries, examples, models, generator=generator) + 3 * keep.T + 5
    if kind == "unbalanced":
        keep = torch.rand(models, examples, generator=generator) < 0.5
        keep[:, [0, 2]], keep[:, [1, 3]] = True, False  # in every model, in none
        keep[0, 2], keep[0, 3] = False, True  # one on a side, none once it is the target
    if kind in ("ties", "both"):
        phi = torch.randint(-1, 2, phi.shape, generator=generator).float() / 4
    if kind == "outlier":
        phi[:, ::2, 3] = 9e5  # what is left without it must not be rounding noise
    if kind == "both":
        phi[0, :20, 3] = 9e5
    return phi, keep


@functools.cache
def inputs(case):
    """(phi, keep, target or None)."""
    phi, keep = make(case.queries, case.examples, case.models, case.kind)
    generator = torch.Generator().manual_seed(case.targets)
    shape = (case.queries, case.examples, case.targets)
    return phi, keep, torch.randn(shape, generator=generator) + 6 if case.targets else None


@functools.cache
def expected(case, variant, variance):
    """By brute force."""
    phi, keep, target = inputs(case)
    return oracle(phi, keep, variant == "online", variance, target)


def compare(result, reference, tolerance=1e-9):
    scores = result[0].cpu()
    usual = reference[0].abs() < 1e20  # all equal on a side: the deviation is the 1e-30 that is added
    torch.testing.assert_close(scores[usual], reference[0][usual], rtol=tolerance, atol=tolerance)
    assert bool((scores[~usual].sign() == reference[0][~usual].sign()).all())
    assert result[1] == reference[1]


@on_backends("lira")
@pytest.mark.parametrize("case", MARKED, ids=str)
def test_scores(backend, case):
    """Close to brute force; and where ties and outliers leave rounding there, still that of the reference."""
    phi, keep, target = inputs(case)
    given = (phi.to(backend.device), keep.to(backend.device))
    outside = None if target is None else target.to(backend.device)
    several_launches = case.targets > 1024  # in which each method takes its targets alike
    for variant, variance in METHODS[:1] if several_launches else METHODS:
        result = lira(*given, variant=variant, variance=variance, target=outside)
        assert result[0].device.type == backend.device.type
        assert result[0].dtype == torch.float64
        assert result[0].shape == (case.targets or case.models, case.examples)
        compare(result, expected(case, variant, variance), case.tolerance)
        if case.tolerance > 1e-9:
            with registry.forced("reference"):
                compare(result, lira(phi, keep, variant=variant, variance=variance, target=target))


@pytest.mark.parametrize(("variant", "variance"), METHODS)
def test_examples_without_shadows_are_counted_and_score_zero(variant, variance):
    phi, keep = make(2, 12, 8, "unbalanced")
    scores, num_unscored = lira(phi, keep, variant=variant, variance=variance)
    assert num_unscored > 0
    assert bool((scores[:, 0] == 0).all())  # no OUT shadow: no evidence


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
    result = by_threads(lambda: lira(phi, keep, variance="fixed")[0])
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


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
@given(st.integers(1, 3), st.integers(1, 9), st.integers(6, 14), st.sampled_from(METHODS), st.integers(0, 2**31))
def test_any_shape(queries, examples, models, kind, seed):
    phi, keep = make(queries, examples, models, seed=seed)
    result = lira(phi, keep, variant=kind[0], variance=kind[1])
    compare(result, oracle(phi, keep, kind[0] == "online", kind[1]))


@pytest.mark.sanitize
@pytest.mark.parametrize("variance", ["per_example", "shrinkage"])
def test_order_of_blocks_and_lanes_does_not_matter(host_cuda, variance):
    """Few blocks, so that each takes several examples; lanes and blocks from the last to the first."""
    phi, keep = make(2, 15, 12)
    with in_use(host_cuda):
        plain = lira(phi, keep, variance="per_example")
        with machine(host_cuda, descending=True, most_blocks=4):
            assert torch.equal(lira(phi, keep, variance="per_example")[0], plain[0])
        plain = lira(phi, keep, variance=variance)
        with machine(host_cuda, descending=True):
            assert torch.equal(lira(phi, keep, variance=variance)[0], plain[0])


def test_too_many_models_are_refused(host_cuda):
    phi, keep = make(1, 2, 1025)
    with in_use(host_cuda), pytest.raises(RuntimeError, match="at most 1024 models, got 1025"):
        lira(phi, keep)


@pytest.mark.gpu
def test_without_a_kernel_for_the_gpu_the_cpu_computes():
    phi, keep = make(1, 4, 1025)
    scores, _ = lira(phi.cuda(), keep.cuda())
    assert scores.is_cuda
    assert torch.equal(scores.cpu(), lira(phi, keep)[0])


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
