"""distillation_metrics on every backend against torch in float64."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics


class Case(NamedTuple):
    """Classes, temperature and dtype, and the regime of a kernel that they reach."""

    classes: int
    T: float
    why: str
    on: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.classes}-T={self.T}-{self.dtype}".replace("torch.", "")


CPU, TRITON = ("cpu",), ("triton",)
CASES = [  # at 1, 2 and 4 C++ takes e^z as a power of e^(z / T), at 3 by itself
    Case(2, 2.0, "the fewest"),
    Case(10, 1.0, "rows across lanes; several rows a program"),
    Case(10, 3.0, "an exponential more", CPU),
    Case(128, 2.0, "C++ across lanes, last", CPU),
    Case(129, 1.0, "by rows, first", CPU),
    Case(129, 3.0, "an exponential more", CPU),
    Case(1000, 4.0, "a tail in AVX-512; no power of two", ("cpu", "triton")),
    Case(1025, 2.0, "two summation blocks", CPU),
    Case(2048, 4.0, "one whole block of Triton, read once", TRITON),
    Case(5000, 4.0, "blocks whose sums move with the row's maximum", TRITON),
    Case(128_256, 4.0, "many", ("triton-gpu",)),
]
HALVES = [case._replace(dtype=d) for case in CASES if case.classes != 2048 for d in (torch.bfloat16, torch.float16)]


def oracle(z, t, y, T):
    z, t = z.double(), t.double()
    p, log_p, p_T = F.softmax(t, 1), F.log_softmax(t, 1), F.softmax(t / T, 1)
    terms = p_T * (F.log_softmax(t / T, 1) - F.log_softmax(z / T, 1))
    values = {
        "kl": T * T * torch.where(p_T > 0, terms, 0).sum(1),
        "agreement": z.argmax(1) == t.argmax(1),
        "teacher_confidence": p.amax(1),
        "teacher_entropy": -torch.where(p > 0, p * log_p, 0).sum(1),
    }
    if y is not None:
        values["cross_entropy"] = F.cross_entropy(z, y, reduction="none")
        values |= {"student_correct": z.argmax(1) == y, "teacher_correct": t.argmax(1) == y}
    return values


def check(backend, z, t, y=None, T=1.0):
    on = backend.device
    result = distillation_metrics(z.to(on), t.to(on), None if y is None else y.to(on), temperature=T)
    expected = oracle(z.detach().cpu(), t.cpu(), y, T)
    for name, value in result._asdict().items():
        if name not in expected:
            assert value is None
        elif value.dtype == torch.bool:
            assert torch.equal(value.cpu(), expected[name]), name
        else:
            torch.testing.assert_close(
                value.cpu().double(), expected[name], rtol=3e-6, atol=3e-6, msg=lambda text, name=name: f"{name} {text}"
            )
    return result


@on_backends("distillation_metrics", cases=CASES + HALVES)
def test_values(backend, case):
    torch.manual_seed(case.classes)
    rows = 33 if case.classes <= 1025 else 7
    t = torch.randn(rows, case.classes).mul(3).to(case.dtype)
    z, y = (t + torch.randn(rows, case.classes)).to(case.dtype), torch.randint(0, case.classes, (rows,))
    y[:3] = t[:3].float().argmax(1)
    y[4] = -100
    z[5, -1] = t[6, -1] = 20.0  # a maximum in the last block
    check(backend, z, t, y, case.T)


# One layout each of C++; one block of Triton and several.
@on_backends("distillation_metrics")
@pytest.mark.parametrize("classes", [20, 300, 5000])
def test_ties_and_classes_that_are_ruled_out(backend, classes):
    z, t = torch.zeros(6, classes), torch.zeros(6, classes)
    z[:, [3, classes - 1]] = 1  # the first of two
    t[:, classes - 1] = 1
    z[0, 0] = t[0, 0] = -math.inf  # by both
    t[1, 1] = -math.inf  # by the teacher: costs q only
    z[2, 2] = -math.inf  # by the student alone: infinite
    t[3, 1:] = -math.inf  # the teacher is sure
    t[4, : classes - 2] = z[4, : classes - 2] = -math.inf  # nothing before the last block
    t[5, 1:], z[5, 0] = -math.inf, -math.inf  # sure of what the student rules out
    result = check(backend, z, t, torch.tensor([3, -100, classes - 1, 0, classes - 1, 3]))
    assert result.agreement.tolist() == [False, False, False, False, True, False]
    assert result.kl[[2, 5]].tolist() == [math.inf, math.inf]
    assert result.teacher_entropy[[3, 5]].tolist() == [0, 0]
    assert result.cross_entropy[1] == 0  # an ignored row


@on_backends("distillation_metrics")
@pytest.mark.parametrize("classes", [7, 300, 5000])
def test_first_of_many_equal_logits(backend, classes):
    torch.manual_seed(classes)
    z, t = torch.randint(0, 3, (2, 70 if classes < 128 else 7, classes)).float()
    check(backend, z, t, t.argmax(1))


@on_backends("distillation_metrics")
def test_strides_mixed_dtypes_no_rows_no_gradients_and_inputs_unchanged(backend):
    wide = torch.randn(5, 40).to(backend.device)
    z, t = wide[:, 3:13], torch.randn(10, 5).to(backend.device, torch.bfloat16).T
    before = wide.clone(), t.clone()
    check(backend, z, t, torch.arange(5))
    result = check(backend, z.requires_grad_(), t)
    assert not result.kl.requires_grad
    assert torch.equal(wide, before[0])
    assert torch.equal(t, before[1])
    empty = torch.zeros(0, 3, device=backend.device)
    assert distillation_metrics(empty, empty).kl.shape == (0,)


# One layout each of C++ and of Triton; a class that is also a prediction, and one that no logit is largest at.
@on_backends("distillation_metrics")
@pytest.mark.parametrize("classes", [7, 300, 5000])
def test_an_ignored_class(backend, classes):
    torch.manual_seed(classes)
    z, t = (torch.randn(6, classes).to(backend.device) for _ in range(2))
    y = torch.tensor([0, 1, 0, 2, 1, 3], device=backend.device)
    z[0, 0] = t[2, 0] = 9.0
    before = y.clone()
    found = distillation_metrics(z, t, y, ignore_index=0)
    wanted = distillation_metrics(z, t, torch.where(y == 0, -100, y))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found.cross_entropy[[0, 2]].tolist() == [0, 0]
    assert not (found.student_correct | found.teacher_correct)[[0, 2]].any()
    assert torch.equal(y, before)


# The kernels themselves: on a CPU the op raises before them. One block of Triton, and several.
@on_backends("distillation_metrics", "reference", "triton")
@pytest.mark.parametrize("classes", [7, 5000])
def test_a_label_outside_poisons_its_row(backend, classes):
    z, t = (torch.randn(5, classes).to(backend.device) for _ in range(2))
    z[:4, -1] = t[:4, -1] = 9.0
    y = torch.tensor([classes - 1, -1, classes, -100, 0], device=backend.device)
    run = registry.resolve("distillation_metrics", ClassesCall(z.device.type, z.dtype, classes))
    *_, cross_entropy, student, teacher = run(z, t, y, 1.0, -100)
    assert cross_entropy.isnan().tolist() == [False, True, True, False, False]
    assert cross_entropy[3] == 0
    assert student.tolist() == teacher.tolist() == [True, False, False, False, False]


def test_full_graph_compile():
    """Labels are read where the op runs, not where it is traced."""
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.randint(0, 10, (5,))
    compiled = torch.compile(lambda *tensors: distillation_metrics(*tensors), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(z, t, y), distillation_metrics(z, t, y), strict=True))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\) or ignore_index -100, got 10"):
        compiled(z, t, y.fill_(10))


def test_opcheck():
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.randint(0, 10, (5,))
    for labels in (y, None):
        torch.library.opcheck(torch.ops.kr_fast.distillation_metrics.default, (z, t, labels, 2.0, -100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, 5)}, "target must have input's shape"),
        ({"labels": torch.tensor([0, 1, 4])}, r"labels must be in \[0, 4\) or ignore_index -100, got 4"),
        ({"labels": torch.tensor([0, 1, 2]), "ignore_index": 2**63}, "ignore_index must be in"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_metrics(**({"input": torch.zeros(3, 4), "target": torch.zeros(3, 4)} | change))
