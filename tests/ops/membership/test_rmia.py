"""The RMIA op on every backend: counts equal to the outer product's, whatever the ties, infinities and rounding."""

import functools
import math
from typing import NamedTuple

import pytest
import torch
from backends import on_backends
from cuda_on_host import in_use, machine
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends.codes import PREDICATES
from kr_fast.ops.membership.rmia import rmia

KINDS = ("distinct", "ties", "infinite", "one value", "neighbours")
DTYPES = (torch.float32, torch.float64)


class Case(NamedTuple):
    """A shape (queries 0: one, without its axis), and why it is there."""

    queries: int
    count: int
    population: int
    reason: str

    def __str__(self) -> str:
        return f"{self.queries}x{self.count}x{self.population}, {self.reason}"


CASES = (
    Case(0, 300, 211, "no axis of queries"),
    Case(1, 40, 50, "one query"),
    Case(3, 120, 110, "a query left over from the pairs"),
    Case(1, 7, 1, "a population of one"),
    *(Case(2, 300, size, "around a block of 512 z, two queries: a tie is no majority") for size in (511, 512, 513)),
    Case(3, 257, 1100, "three blocks of z, the last part full"),
    Case(18, 40, 1100, "18 queries, as in the paper"),
    *(Case(1, 5, size, "around a tile of 32 z") for size in (31, 32, 33)),
    *(Case(2, count, 130, "around a block of 256 x") for count in (256, 257)),
    *(Case(queries, 5, 130, "around the queries held in shared memory at a time") for queries in (64, 65)),
)
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


@functools.cache
def make(queries, count, population, dtype, kind="distinct"):
    generator = torch.Generator().manual_seed(count + population)
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


def check(backend, inputs, **options):
    """The counts of the definition, and the tie breaker."""
    x, z = inputs
    fraction, log_ratio = rmia(x.to(backend.device), z.to(backend.device), **options)
    assert fraction.device.type == log_ratio.device.type == backend.device.type
    assert torch.equal(fraction.cpu(), outer(x, z, options["gamma"], options["predicate"])), options
    logs = x.double().log()
    torch.testing.assert_close(log_ratio.cpu(), logs if x.ndim == 1 else logs.clamp(-1000, 1000).mean(0))


@on_backends("rmia")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(backend, case):
    for kind in ("distinct", "ties", "infinite"):
        check(backend, make(*case[:3], torch.float32, kind), gamma=1.3, predicate="ratio")


@pytest.mark.sanitize
@on_backends("rmia")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_predicates(backend, dtype, kind):
    """That of the paper, of Privacy Meter 2, and of the code published with the paper."""
    for queries in (0, 1, 3):
        for predicate in PREDICATES:
            for gamma in (1.0, 2.0, 0.7):
                check(backend, make(queries, 40, 50, dtype, kind), gamma=gamma, predicate=predicate)


def test_predicates_differ_at_ties_and_roundings():
    x, z = make(0, 300, 200, torch.float32, "neighbours")
    counts = [rmia(x, z, predicate=predicate)[0] for predicate in PREDICATES]
    assert bool((counts[0] > counts[1]).any())  # x equal to z
    assert bool((counts[1] != counts[2]).any())  # x fl(1 / z) on the other side of 1


def test_vote_of_one_query_is_the_single_query():
    x, z = make(1, 2000, 700, torch.float64)
    assert torch.equal(rmia(x, z)[0], rmia(x[0], z[0])[0])


@pytest.mark.parametrize("queries", [0, 5])
def test_bits_do_not_depend_on_threads(by_threads, queries):
    x, z = make(queries, 5000, 600, torch.float32)
    result = by_threads(lambda: rmia(x, z)[0])
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_order_of_blocks_and_lanes_does_not_matter(host_cuda):
    x, z = make(3, 600, 70, torch.float32, "ties")
    with in_use(host_cuda):
        plain, single = rmia(x, z)[0], rmia(x[0], z[0])[0]
        with machine(host_cuda, descending=True):
            assert torch.equal(rmia(x, z)[0], plain)
        with machine(host_cuda, descending=True, most_blocks=1):
            assert torch.equal(rmia(x[0], z[0])[0], single)


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
