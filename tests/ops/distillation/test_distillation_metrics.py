"""distillation_metrics against torch in float64, on every backend that a CPU can run.

Class counts: 2 smallest; 10, 100 rows across lanes; 128 the last that are, 129 the first row-wise; 1000 with a tail in
AVX-512; 1025 two summation blocks. Temperatures: 1, 2, 4 take e^z as a power of e^(z / T), 3 by itself.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics


def oracle(z, t, y, T):
    z, t = z.double(), t.double()
    p, log_p = F.softmax(t, 1), F.log_softmax(t, 1)
    kl = T * T * (F.softmax(t / T, 1) * (F.log_softmax(t / T, 1) - F.log_softmax(z / T, 1))).sum(1)
    return {
        "kl": kl,
        "agreement": z.argmax(1) == t.argmax(1),
        "teacher_confidence": p.amax(1),
        "teacher_entropy": -(p * log_p).sum(1),
        "cross_entropy": F.cross_entropy(z, y, reduction="none"),
        "student_correct": z.argmax(1) == y,
        "teacher_correct": t.argmax(1) == y,
    }


@pytest.mark.parametrize(
    ("classes", "temperature"),
    [(2, 2.0), (10, 1.0), (10, 3.0), (100, 4.0), (128, 2.0), (129, 1.0), (129, 3.0), (1000, 4.0), (1025, 2.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values(isa, classes, temperature, dtype):
    torch.manual_seed(classes)
    t = torch.randn(33, classes).mul(3).to(dtype)
    z, y = (t + torch.randn(33, classes)).to(dtype), torch.randint(0, classes, (33,))
    y[:9] = t[:9].float().argmax(1)
    found = distillation_metrics(z, t, y, temperature=temperature)._asdict()
    for name, wanted in oracle(z, t, y, temperature).items():
        if wanted.dtype == torch.bool:
            assert torch.equal(found[name], wanted), name
        else:
            torch.testing.assert_close(found[name].double(), wanted, rtol=3e-6, atol=3e-6, msg=name)
    torch.testing.assert_close(
        found["kl"], distillation_loss(z, t, temperature=temperature, reduction="none"), rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("classes", [20, 300])  # one layout each
def test_ties_go_to_the_first_and_ignored_rows_count_nothing(isa, classes):
    z, t = torch.zeros(2, classes), torch.zeros(2, classes)
    z[:, [3, 17]] = 1
    t[:, 17] = 1
    found = distillation_metrics(z, t, torch.tensor([3, -100]))
    assert found.agreement.tolist() == [False, False]
    assert found.student_correct.tolist() == [True, False]
    assert found.cross_entropy[1] == 0
    t[0, 0] = z[0, 0] = -math.inf
    assert torch.isfinite(distillation_metrics(z, t).kl).all()
    assert torch.isfinite(distillation_metrics(z, t).teacher_entropy).all()
    t[0, 1:] = -math.inf
    t[0, 0] = 2.0  # sure of class 0, which the student rules out
    sure = distillation_metrics(z, t)
    assert [sure.kl[0], sure.teacher_confidence[0], sure.teacher_entropy[0]] == [math.inf, 1, 0]


@pytest.mark.parametrize("classes", [7, 40, 300, 2000])
def test_first_of_many_equal_logits(isa, classes):
    torch.manual_seed(classes)
    z, t = torch.randint(0, 3, (70, classes)).float(), torch.randint(0, 3, (70, classes)).float()
    y = t.argmax(1)
    found = distillation_metrics(z, t, y)
    assert torch.equal(found.agreement, z.argmax(1) == y)
    assert torch.equal(found.student_correct, z.argmax(1) == y)
    assert found.teacher_correct.all()


def test_without_labels_without_rows_without_gradients_and_by_strides():
    wide = torch.randn(5, 40, requires_grad=True)
    z, t = wide[:, 3:13], torch.randn(10, 5).T
    found = distillation_metrics(z, t)
    assert found.cross_entropy is found.student_correct is found.teacher_correct is None
    assert not found.kl.requires_grad
    with registry.forced("reference"):
        wanted = distillation_metrics(z, t)
    for ours, theirs in zip(found[:4], wanted[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert distillation_metrics(torch.zeros(0, 3), torch.zeros(0, 3)).kl.shape == (0,)


def test_opcheck():
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.randint(0, 10, (5,))
    for labels in (y, None):
        torch.library.opcheck(torch.ops.kr_fast.distillation_metrics.default, (z, t, labels, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, 5)}, "target must have input's shape"),
        ({"labels": torch.tensor([0, 1, 4])}, r"labels must be in \[0, 4\) or ignore_index -100, got 4"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_metrics(**({"input": torch.zeros(3, 4), "target": torch.zeros(3, 4)} | change))
