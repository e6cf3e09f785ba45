"""membership_signals on every backend against its formulas in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from backends import on_backends
from cuda_on_host import in_use, machine
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals

# Of the C++ kernels; the entropies of GPU kernels are summed in fewer parts.
TOLERANCE = {"phi": 2e-6, "loss": 2e-6, "entropy": 2e-5, "modified_entropy": 2e-5, "confidence": 1e-6, "correct": 0}
TOLERANCE_GPU = TOLERANCE | {"entropy": 4e-6, "modified_entropy": 4e-6}
HALVES = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A shape, and why it is there."""

    rows: int
    classes: int
    reason: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} {str(self.dtype)[6:]}, {self.reason}"


CASES = (
    Case(1, 2, "one row, phi a plain difference"),
    Case(15, 3, "odd, a lane of AVX-512 less"),
    Case(16, 10, "the lanes of AVX-512"),
    Case(17, 10, "a lane more"),
    Case(1000, 10, "several blocks on several threads"),
    Case(130, 2, "a second tile of 128 rows"),
    Case(130, 32, "the last with a thread a row"),
    Case(7, 33, "lanes of a warp a row, odd"),
    Case(7, 64, "lanes of a warp"),
    Case(7, 100, "several rows a program"),
    Case(7, 128, "the last with rows across lanes of AVX-512"),
    Case(7, 129, "the first row by row"),
    *(Case(7, classes, "lanes of a warp, more elements each") for classes in (200, 500)),
    Case(7, 1000, "one summation block, not a power of two"),
    Case(7, 1025, "two summation blocks with a tail, a block of threads a row"),
    Case(7, 2048, "one whole block of Triton, read once"),
    Case(7, 2049, "two blocks of Triton"),
    *(Case(7, classes, "a block of threads a row") for classes in (3000, 5000, 16384)),
    *(Case(3, classes, "a block that sweeps") for classes in (16385, 20001)),
    *(
        Case(9, classes, "reads of 16 and 8 bytes, and by element", d)
        for d in HALVES
        for classes in (10, 11, 104, 1032)
    ),
    Case(9, 16392, "half precision, a block that sweeps", torch.bfloat16),
    Case(40, 10, "float64, which the reference computes", torch.float64),
)


def oracle(logits, labels):
    """By the docstring in float64; ln(1 - p_j) is summed over the other classes, those before and those after j."""
    z, y = logits.detach().cpu().double(), labels.cpu()[:, None]
    ahead = torch.full((len(z), 1), -math.inf, dtype=torch.float64)
    before = torch.cat([ahead, z.logcumsumexp(1)[:, :-1]], 1)
    after = torch.cat([z.flip(1).logcumsumexp(1).flip(1)[:, 1:], ahead], 1)
    others, total = torch.logaddexp(before, after), z.logsumexp(1, keepdim=True)
    log_p, log_rest = z - total, others - total
    p, phi = log_p.exp(), (z - others).gather(1, y)[:, 0]
    loss = torch.where(phi > 0, torch.log1p(torch.exp(-phi)), -phi + torch.log1p(torch.exp(phi)))
    some = p > 0
    apart = torch.where(some, p * log_rest, 0.0).scatter(1, y, 0.0)
    entropy = -torch.where(some, p * log_p, 0.0).sum(1)
    certain = log_rest.gather(1, y)[:, 0].exp()  # 1 - p_y
    modified = torch.where(certain > 0, certain * loss, 0.0) - apart.sum(1)
    correct = (z.argmax(1) == y[:, 0]).double()
    values = (phi, loss, entropy, modified, torch.exp(-loss), correct)
    return dict(zip(SIGNALS, values, strict=True))


def make(rows, classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + classes)
    logits = (4 * torch.randn(rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::2] = logits[::2].float().argmax(1)  # answers that are right, and sure
    if rows > 6:
        logits[5, -1] = 30.0  # the largest in the last block
        logits[6] = (logits[6] / 2).round()  # many equal ones
    return logits, labels


def compare(result, expected, tolerances=TOLERANCE):
    for name, tolerance in tolerances.items():
        if name in result:
            words = f"{name}: {{}}".format
            torch.testing.assert_close(
                result[name].double().cpu(), expected[name].double(), rtol=tolerance, atol=tolerance, msg=words
            )


def check(backend, logits, labels, want=SIGNALS):
    """The signals on a backend beside the definition; what it was given stays as it was."""
    moved = logits.to(backend.device) if backend.device.type != logits.device.type else logits
    before = moved.clone()
    result = membership_signals(moved, labels.to(backend.device), want)
    assert torch.equal(moved, before)
    assert all(value.dtype == torch.float32 and value.shape == labels.shape for value in result.values())
    assert all(value.device.type == backend.device.type for value in result.values())
    gpu = backend.name in ("cuda", "triton")
    compare(result, oracle(logits, labels), TOLERANCE_GPU if gpu else TOLERANCE)
    return result


@pytest.mark.sanitize
@on_backends("membership_signals")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(backend, case):
    """Half precision is read exactly and computed in float32."""
    backend.require("membership_signals", ClassesCall(backend.device.type, case.dtype, case.classes))
    check(backend, *make(*case[:2], case.dtype))


@on_backends("membership_signals")
@pytest.mark.parametrize("classes", [3, 140, 2000, 5000, 17000])
def test_classes_that_are_ruled_out_and_equal_ones(backend, classes):
    """-inf logits: certain of the label, certain of another class, and one class masked; ties; saturated answers."""
    inf, last = math.inf, classes - 1
    logits = torch.full((6, classes), -inf)
    logits[:3, :3] = torch.tensor([[2.0, -inf, -inf], [-inf, 1.0, 0.0], [1.0, 0.5, -inf]])
    logits[3:] = 0.0
    logits[3, [1, last]] = 4.0  # the first of equal ones is the answer
    logits[4, last], logits[5, last] = 80.0, -80.0  # p = 1 in float32, and the smallest p
    labels = torch.tensor([0, 0, 0, last, last, last])
    result = check(backend, logits, labels)
    assert result["phi"][:3].tolist() == [inf, -inf, 0.5]
    assert result["loss"][:2].tolist() == [0.0, inf]
    assert result["confidence"][:2].tolist() == [1.0, 0.0]
    assert result["entropy"][0] == result["modified_entropy"][0] == 0
    assert result["correct"].tolist() == [1, 0, 1, 0, 1, 0]
    assert result["phi"][4] == pytest.approx(80 - math.log(classes - 1), rel=1e-6)


@on_backends("membership_signals")
def test_strides_addresses_parts_and_no_rows(backend):
    """Rows of a wider tensor, at an address and a stride that forbid wide reads; classes that are not the fast axis."""
    for classes in (10, 100, 3000):
        logits, labels = make(5, classes)
        wide = torch.empty(5, classes + 3, device=backend.device)
        for first in (0, 1):
            view = wide[:, first : first + classes]
            view.copy_(logits)
            check(backend, view, labels)
        check(backend, logits.T.contiguous().T, labels)
        whole = check(backend, logits, labels)
        for name in SIGNALS:
            assert torch.equal(check(backend, logits, labels, (name,))[name], whole[name])
    empty = torch.empty(0, 5, device=backend.device)
    assert membership_signals(empty, torch.empty(0, device=backend.device).long())["phi"].shape == (0,)


def test_margins_where_probabilities_saturate(isa):
    """p_y rounds to 1 in float32 from a margin of 17 on and in float64 from 37 on; phi and loss keep their digits."""
    margins = torch.tensor([0.0, 8.0, 15.0, 17.0, 20.0, 38.0, 60.0, 80.0])
    logits = torch.zeros(len(margins), 10)
    logits[:, 3] = margins
    labels = torch.full((len(margins),), 3)
    result = membership_signals(logits, labels, ("phi", "loss"))
    exact = margins.double() - math.log(9)
    assert torch.allclose(result["phi"].double(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(
        result["loss"].double(), torch.nn.functional.softplus(-exact, threshold=1e9), rtol=3e-6, atol=0
    )
    opposite = membership_signals(-logits, labels, ("phi", "loss"))
    exact = -margins.double() - math.log(9)
    assert torch.allclose(opposite["phi"].double(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(opposite["loss"].double(), torch.log1p(torch.exp(-exact)), rtol=1e-6, atol=0)


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


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [10, 100, 1025, 16385])
def test_order_of_blocks_and_threads_does_not_matter(host_cuda, classes):
    """Few blocks, so that each takes several rows; threads from the last to the first: a missing barrier would show."""
    logits, labels = make(300 if classes == 10 else 9, classes)
    with in_use(host_cuda):
        plain = membership_signals(logits, labels, SIGNALS)
        with machine(host_cuda, descending=True, most_blocks=2):
            result = membership_signals(logits, labels, SIGNALS)
    for name in SIGNALS:
        assert torch.equal(result[name], plain[name]), name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets of rows beyond 32 bits: the last rows against a call of their own."""
    rows, classes = 2**31 // 1000 + 200, 1000
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.float16)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    with registry.forced("cuda"):
        whole = membership_signals(logits, labels, SIGNALS)
        part = membership_signals(logits[-300:].clone(), labels[-300:], SIGNALS)
    for name in SIGNALS:
        assert torch.equal(whole[name][-300:], part[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 30), st.integers(0, 2**31))
def test_any_shape_and_scale(rows, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    result = membership_signals(logits, labels, SIGNALS)
    compare(result, oracle(logits, labels))
    shifted = membership_signals(logits.double() + 100, labels, ("phi",))["phi"]  # softmax does not see a shift
    assert torch.allclose(shifted, result["phi"], rtol=1e-5, atol=1e-5)


def test_values_that_the_caller_vouches_for():
    logits, labels = torch.randn(30, 10), torch.randint(0, 10, (30,))
    plain = membership_signals(logits, labels, SIGNALS)
    for name, value in membership_signals(logits, labels, SIGNALS, validate_args=False).items():
        assert torch.equal(value, plain[name])
    logits[3] = torch.nan  # nothing is refused, and the neighbours stay right
    phi = membership_signals(logits, labels, validate_args=False)["phi"]
    assert torch.equal(phi[4:], plain["phi"][4:])


def test_full_graph_compile():
    """Values are checked where the op runs, not where it is traced."""
    logits, labels = torch.randn(5, 10), torch.randint(0, 10, (5,))
    compiled = torch.compile(
        lambda *tensors: membership_signals(*tensors, SIGNALS), fullgraph=True, backend="aot_eager"
    )
    for name, value in membership_signals(logits, labels, SIGNALS).items():
        assert torch.equal(compiled(logits, labels)[name], value)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 10\), got \[10, 10\]"):
        compiled(logits, labels.fill_(10))


def test_registered_op():
    arguments = (torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), "phi,loss")
    for validate in (False, True):
        torch.library.opcheck(torch.ops.kr_fast.membership_signals.default, (*arguments, validate))


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
