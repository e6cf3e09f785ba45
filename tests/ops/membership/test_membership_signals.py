"""membership_signals against its formulas in float64.

Class counts, each with its regime: 2, where phi is a plain difference; 3 odd; 10 usual; 128 the last with rows across
lanes, 129 the first row-wise; 1000, 1025 one and two summation blocks, with a tail.
Rows: 1; 15, 16, 17 around the lanes of AVX-512; 1000 several blocks on several threads.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.backends import registry
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals

TOLERANCE = {"phi": 2e-6, "loss": 2e-6, "entropy": 2e-5, "modified_entropy": 2e-5, "confidence": 1e-6, "correct": 0}


def oracle(logits, labels):
    """One row at a time in float64, by the docstring; ln(1 - p_j) is summed over the other classes."""
    rows = []
    for z, y in zip(logits.double(), labels.tolist(), strict=True):
        others = [torch.cat([z[:j], z[j + 1 :]]).logsumexp(0) for j in range(len(z))]
        total = z.logsumexp(0)
        log_p = (z - total).tolist()
        log_rest = [float(other - total) for other in others]
        p = [math.exp(value) for value in log_p]
        phi = float(z[y] - others[y])
        loss = math.log1p(math.exp(-phi)) if phi > 0 else -phi + math.log1p(math.exp(phi))
        modified = math.exp(log_rest[y]) * loss
        modified -= sum(p[j] * log_rest[j] for j in range(len(z)) if j != y and p[j] > 0)
        entropy = -sum(p[j] * log_p[j] for j in range(len(z)) if p[j] > 0)
        rows.append([phi, loss, entropy, modified, math.exp(-loss), float(int(z.argmax()) == y)])
    return dict(zip(SIGNALS, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def compare(found, wanted):
    for name, tolerance in TOLERANCE.items():
        error = (found[name].double() - wanted[name]).abs()
        assert bool((error <= tolerance * (1 + wanted[name].abs())).all()), f"{name}: {float(error.max())}"


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_values(isa, rows, classes):
    torch.manual_seed(rows + classes)
    logits, labels = 6 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    before = logits.clone()
    found = membership_signals(logits, labels, SIGNALS)
    compare(found, oracle(logits, labels))
    assert torch.equal(logits, before)
    assert all(value.dtype == torch.float32 and value.shape == (rows,) for value in found.values())


@pytest.mark.parametrize("classes", [100, 128, 129, 1000, 1025])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_many_classes(isa, classes, backend):
    torch.manual_seed(classes)
    logits, labels = 4 * torch.randn(21, classes), torch.randint(0, classes, (21,))
    labels[:7] = logits[:7].argmax(1)
    logits[8] = (logits[8] * 0.5).round()  # many equal ones
    with registry.forced(backend):
        compare(membership_signals(logits, labels, SIGNALS), oracle(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """Half precision is read exactly and computed in float32; float64 runs on the reference."""
    torch.manual_seed(0)
    logits, labels = (5 * torch.randn(40, 10)).to(dtype), torch.randint(0, 10, (40,))
    compare(membership_signals(logits, labels, SIGNALS), oracle(logits, labels))


def test_margins_where_probabilities_saturate(isa):
    """p_y rounds to 1 in float32 from a margin of 17 on and in float64 from 37 on; phi and loss keep their digits."""
    margins = torch.tensor([0.0, 8.0, 15.0, 17.0, 20.0, 38.0, 60.0, 80.0])
    logits = torch.zeros(len(margins), 10)
    logits[:, 3] = margins
    labels = torch.full((len(margins),), 3)
    found = membership_signals(logits, labels, ("phi", "loss"))
    exact = margins.double() - math.log(9)
    assert torch.allclose(found["phi"].double(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(
        found["loss"].double(), torch.nn.functional.softplus(-exact, threshold=1e9), rtol=3e-6, atol=0
    )
    opposite = membership_signals(-logits, labels, ("phi", "loss"))
    exact = -margins.double() - math.log(9)
    assert torch.allclose(opposite["phi"].double(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(opposite["loss"].double(), torch.log1p(torch.exp(-exact)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [3, 140])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_classes_that_are_ruled_out(isa, backend, classes):
    """-inf logits: certain of the label, certain of another class, and one class masked."""
    inf = math.inf
    logits = torch.full((3, classes), -inf)
    logits[:, :3] = torch.tensor([[2.0, -inf, -inf], [-inf, 1.0, 0.0], [1.0, 0.5, -inf]])
    with registry.forced(backend):
        found = membership_signals(logits, torch.zeros(3, dtype=torch.int64), SIGNALS)
    assert found["phi"].tolist() == [inf, -inf, 0.5]
    assert found["loss"][:2].tolist() == [0.0, inf]
    assert found["confidence"][:2].tolist() == [1.0, 0.0]
    assert found["entropy"][0] == 0
    assert found["modified_entropy"][0] == 0
    assert found["correct"].tolist() == [1.0, 0.0, 1.0]


def test_first_of_equal_logits_is_the_answer():
    logits = torch.tensor([[1.0, 1.0, 0.0]]).repeat(3, 1)
    assert membership_signals(logits, torch.arange(3), ("correct",))["correct"].tolist() == [1.0, 0.0, 0.0]


def test_any_strides_and_leading_shape():
    torch.manual_seed(1)
    logits, labels = torch.randn(3, 10, 7), torch.randint(0, 10, (3, 7))
    view = logits.transpose(1, 2)  # classes are not the fast axis
    plain = membership_signals(view.contiguous(), labels)["phi"]
    assert torch.equal(membership_signals(view, labels)["phi"], plain)
    wide = torch.randn(5, 24)
    assert torch.equal(
        membership_signals(wide[:, 1:11], torch.arange(5))["phi"],
        membership_signals(wide[:, 1:11].contiguous(), torch.arange(5))["phi"],
    )
    assert membership_signals(torch.randn(10), torch.tensor(3))["phi"].shape == ()
    assert membership_signals(torch.randn(0, 10), torch.zeros(0, dtype=torch.int64))["phi"].shape == (0,)


def test_bits_do_not_depend_on_neighbours_or_threads():
    torch.manual_seed(2)
    logits, labels = torch.randn(1003, 10), torch.randint(0, 10, (1003,))
    whole = membership_signals(logits, labels, SIGNALS)
    part = membership_signals(logits[501:520], labels[501:520], SIGNALS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = membership_signals(logits, labels, SIGNALS)
    finally:
        torch.set_num_threads(before)
    for name in SIGNALS:
        assert torch.equal(whole[name][501:520], part[name])
        assert torch.equal(whole[name], single[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 30), st.integers(0, 2**31))
def test_any_shape_and_scale(rows, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    found = membership_signals(logits, labels, SIGNALS)
    compare(found, oracle(logits, labels))
    shifted = membership_signals(logits.double() + 100, labels, ("phi",))["phi"]  # softmax does not see a shift
    assert torch.allclose(shifted, found["phi"], rtol=1e-5, atol=1e-5)


def test_values_that_the_caller_vouches_for():
    logits, labels = torch.randn(30, 10), torch.randint(0, 10, (30,))
    plain = membership_signals(logits, labels, SIGNALS)
    for name, value in membership_signals(logits, labels, SIGNALS, validate_args=False).items():
        assert torch.equal(value, plain[name])
    logits[3] = torch.nan  # nothing is refused, and the neighbours stay right
    phi = membership_signals(logits, labels, validate_args=False)["phi"]
    assert torch.equal(phi[4:], plain["phi"][4:])


def test_registered_op():
    arguments = (torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), "phi,loss")
    torch.library.opcheck(torch.ops.kr_fast.membership_signals.default, arguments)


@pytest.mark.parametrize(
    ("logits", "labels", "want", "error", "words"),
    [
        ([[0.0, 1.0]], torch.tensor([0]), ("phi",), TypeError, "logits must be a tensor"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            ("phi",),
            ValueError,
            "floating point",
        ),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), ("phi",), ValueError, "C >= 2"),
        (torch.zeros(2, 3), torch.zeros(2), ("phi",), TypeError, "labels must be int64"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ("phi",), ValueError, r"labels must be \[2\] on cpu"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ("phi",), ValueError, r"labels must lie in \[0, 3\), got \[0, 3\]"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), ("phi",), ValueError, r"got \[-1, 0\]"),
        (torch.zeros(2, 3), torch.tensor([0, 0]), ("margin",), ValueError, "want must hold names among phi"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), ("phi",), ValueError, "1 NaN"),
        (torch.tensor([[math.inf, 1.0]]), torch.tensor([1]), ("phi",), ValueError, r"1 \+inf"),
        (torch.full((1, 3), -math.inf), torch.tensor([1]), ("phi",), ValueError, "rows of -inf only"),
    ],
)
def test_bad_input(logits, labels, want, error, words):
    with pytest.raises(error, match=f"membership_signals: .*{words}"):
        membership_signals(logits, labels, want)
