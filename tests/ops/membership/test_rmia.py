"""The RMIA op: counts equal to the outer product's, whatever the ties, infinities and rounding.

Z: 1; 511, 512, 513 around a block of 512; 1,100 three blocks, the last part full. N around the 256 and 1,024 x's of a
thread's least share. A: 1 and 2 (a tie is no majority), 3 (a query left over from the pairs), 18 as in the paper.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.codes import PREDICATES
from kr_fast.ops.membership.rmia import rmia

BACKENDS = ("cpu", "reference")
DOMINATES = {
    "ratio": lambda x, z, gamma: x / z >= gamma,
    "ratio_strict": lambda x, z, gamma: x / z > gamma,
    "reciprocal": lambda x, z, gamma: x * (1 / z) > gamma,
}


def outer(x, z, gamma, predicate="ratio"):
    """The definition: every pair divided, in the dtype of the inputs; the vote over the first axis."""
    x, z = (value[None] if value.ndim == 1 else value for value in (x, z))
    votes = DOMINATES[predicate](x[:, :, None], z[:, None, :], torch.tensor(gamma, dtype=x.dtype)).sum(0)
    return (2 * votes > len(x)).sum(1).double() / z.shape[1]


def make(queries, count, population, dtype, kind="distinct", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = [(queries, n) if queries else (n,) for n in (count, population)]
    x, z = (torch.randn(s, dtype=torch.float64, generator=generator).exp() for s in shape)
    if kind == "ties":
        x, z = (x * 2).round() / 2, (z * 2).round() / 2  # zeros among them
    if kind == "infinite":
        x.view(-1)[::3], z.view(-1)[::2] = math.inf, math.inf
        x.view(-1)[1::5], z.view(-1)[1::5] = 0.0, 0.0
    if kind == "one value":
        x, z = torch.ones_like(x), torch.ones_like(z)
    if kind == "neighbours":  # ratios within a few roundings of gamma
        step = torch.finfo(dtype).eps
        x, z = (3 * (1 + step * torch.randint(-4, 5, s, generator=generator).double()) for s in shape)
    return x.to(dtype), z.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite", "one value", "neighbours"])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 0.7])
def test_counts_are_those_of_the_outer_product(backend, dtype, kind, gamma):
    x, z = make(0, 300, 211, dtype, kind)
    with registry.forced(backend):
        fraction, log_ratio = rmia(x, z, gamma=gamma)
    assert torch.equal(fraction, outer(x, z, gamma))
    assert torch.equal(log_ratio, x.double().log())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ties", "infinite", "neighbours"])
@pytest.mark.parametrize("predicate", PREDICATES)
def test_predicates(backend, dtype, kind, predicate):
    """That of the paper, of Privacy Meter 2, and of the code published with the paper."""
    for queries in (0, 3):
        for gamma in (1.0, 2.0):
            x, z = make(queries, 120, 110, dtype, kind)
            with registry.forced(backend):
                found = rmia(x, z, gamma=gamma, predicate=predicate)[0]
            assert torch.equal(found, outer(x, z, gamma, predicate))


def test_predicates_differ_at_ties_and_roundings():
    x, z = make(0, 300, 200, torch.float32, "neighbours")
    counts = [rmia(x, z, predicate=predicate)[0] for predicate in PREDICATES]
    assert bool((counts[0] > counts[1]).any())  # x equal to z
    assert bool((counts[1] != counts[2]).any())  # x fl(1 / z) on the other side of 1


@pytest.mark.parametrize("population", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize(("queries", "count"), [(1, 7), (2, 300), (3, 257), (18, 40)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite"])
def test_vote(population, queries, count, kind):
    x, z = make(queries, count, population, torch.float32, kind)
    fraction, log_ratio = rmia(x, z, gamma=1.3)
    assert torch.equal(fraction, outer(x, z, 1.3))
    assert torch.equal(log_ratio, x.double().log().clamp(-1000, 1000).mean(0))
    with registry.forced("reference"):
        assert torch.equal(rmia(x, z, gamma=1.3)[0], fraction)


def test_vote_of_one_query_is_the_single_query():
    x, z = make(1, 2000, 700, torch.float64)
    assert torch.equal(rmia(x, z)[0], rmia(x[0], z[0])[0])


@pytest.mark.parametrize("queries", [0, 5])
def test_bits_do_not_depend_on_threads(by_threads, queries):
    x, z = make(queries, 5000, 600, torch.float32)
    found = by_threads(lambda: rmia(x, z)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


EDGE = st.sampled_from([0.0, -0.0, 1e-320, 5e-324, 1e-300, 0.1, 0.3, 1.0, 3.0, 1e300, 1.7e308, math.inf])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(EDGE, min_size=1, max_size=30),
    st.lists(EDGE, min_size=1, max_size=30),
    st.sampled_from([1e-300, 0.3, 1.0, 3.0, 1e300]),
    st.sampled_from(PREDICATES),
)
def test_extreme_values(x, z, gamma, predicate):
    x, z = torch.tensor(x, dtype=torch.float64), torch.tensor(z, dtype=torch.float64)
    assert torch.equal(rmia(x, z, gamma=gamma, predicate=predicate)[0], outer(x + 0.0, z + 0.0, gamma, predicate))


def test_the_public_name():
    assert kr_fast.membership.rmia is rmia


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("x", "z", "options", "error", "words"),
    [
        (ONE.half(), ONE, {}, TypeError, "p_x must be float32 or float64"),
        (ONE, ONE.double(), {}, TypeError, "p_z must have the dtype of p_x"),
        (ONE, ONE.expand(2, 3), {}, ValueError, "p_z must have the queries of p_x"),
        (ONE, ONE[:0], {}, ValueError, r"p_z must hold 1 to 2\^31 - 1 examples"),
        (ONE[:0].view(0, 0), ONE[:0].view(0, 0), {}, ValueError, "p_z must hold"),
        (-ONE, ONE, {}, ValueError, "p_x must be >= 0 .ratios, not their logarithms., got -1"),
        (ONE, ONE * math.nan, {}, ValueError, "p_z must not hold NaN"),
        (ONE, ONE, {"gamma": 0.0}, ValueError, "gamma must be positive and finite, got 0.0"),
        (ONE, ONE, {"predicate": "both"}, ValueError, "predicate must be one of ratio, ratio_strict, reciprocal"),
        (ONE, ONE, {"gamma": math.nan}, ValueError, "gamma must be positive and finite"),
    ],
)
def test_bad_input(x, z, options, error, words):
    with pytest.raises(error, match=f"rmia: {words}"):
        rmia(x, z, **options)
