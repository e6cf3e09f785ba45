"""The siblings that share distillation_loss's kernel, on every backend: top-k soft labels and soft cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from distillation_cases import DTYPES, case_at, compare, draw, each_kernel, on

from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_topk, soft_cross_entropy

# A cluster whose rows are not copied; the fewest lanes, and the fewest that a thread has 8 registers for.
CASES = [*each_kernel(), case_at(16_385), case_at(33), case_at(7)]


def dense(values, indices, classes, tail):
    """The soft labels that top-k stands for, in float64."""
    values = values.double()
    if tail == "renorm":
        return torch.zeros(len(values), classes, dtype=torch.float64).scatter(
            1, indices, values / values.sum(1, keepdim=True)
        )
    rest = (1 - values.sum(1, keepdim=True)) / max(classes - values.shape[1], 1)
    return rest.clamp_min(0).expand(-1, classes).scatter(1, indices, values)


def kl(p, z, T):
    return T * T * torch.where(p > 0, p * (p.log() - F.log_softmax(z / T, 1)), 0).sum(1)


@on_backends(
    "distillation_loss",
    cases=CASES + [case_at(n, "cpu", "cuda", target_dtype=dtype) for n in (10, 1000) for dtype in DTYPES[1:]],
)
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
def test_topk_equals_its_dense_soft_labels(backend, case, tail):
    z, t, y = draw(case.classes, rows=7)
    values, indices = t.softmax(1).topk(5)
    if case.target_dtype is not None:
        values = (values * 0.9).to(case.target_dtype)  # so that rounding does not bring a row above 1
    p = dense(values, indices, case.classes, tail)
    given, labels = on(backend.device, values, indices), y.to(backend.device)
    for reduction in ("none", "mean"):
        options = {"tail": tail, "temperature": 2.0, "hard_weight": 0.5, "reduction": reduction}

        def exact(z, reduction=reduction):
            rows = kl(p, z, 2.0) + 0.5 * F.cross_entropy(z, y, reduction="none")
            return rows if reduction == "none" else rows.mean()

        compare(
            lambda z, options=options: distillation_loss_topk(z, *given, labels, **options), exact, z.to(backend.device)
        )


def test_topk_of_all_classes_and_int32_indices(isa):
    z, p = torch.randn(4, 6), torch.randn(4, 6).softmax(1)
    values, indices = p.topk(6)
    for tail in ("smooth", "renorm"):
        result = distillation_loss_topk(z, values, indices.int(), tail=tail)
        torch.testing.assert_close(result, distillation_loss(z, p, target_type="probs"), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"indices": torch.tensor([[0, 4]] * 3)},
            r"distillation_loss_topk: indices must be in \[0, 4\), got \[0, 4\] in row 0",
        ),
        ({"indices": torch.tensor([[0, -1]] * 3)}, r"indices must be in \[0, 4\)"),
        ({"indices": torch.tensor([[0]] * 3)}, r"indices must be \[3, 2\]"),
        ({"values": torch.full((3, 5), 0.1)}, r"values must be \[3, k\] with 1 <= k <= 4"),
        ({"values": torch.full((2, 2), 0.1)}, r"values must be \[3, k\]"),
        ({"tail": "drop"}, "tail must be one of smooth, renorm, got 'drop'"),
    ],
)
def test_topk_bad_input(change, message):
    arguments = {"input": torch.zeros(3, 4), "values": torch.full((3, 2), 0.3), "indices": torch.tensor([[0, 2]] * 3)}
    with pytest.raises(ValueError, match=message):
        distillation_loss_topk(**(arguments | change))


@on_backends("distillation_loss", cases=CASES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_against_torch(backend, case, temperature):
    z, p, _ = draw(case.classes, kind="probs", rows=5)
    p[0] = F.one_hot(torch.tensor(1), case.classes)
    target = p.to(backend.device)
    compare(
        lambda z: soft_cross_entropy(z, target, temperature=temperature),
        lambda z: temperature**2 * F.cross_entropy(z / temperature, p.double()),
        z.to(backend.device),
    )
    z, logits = on(backend.device, z, p.clamp_min(1e-9).log())
    by_logits = soft_cross_entropy(z, logits, target_type="logits")
    torch.testing.assert_close(by_logits, soft_cross_entropy(z, logits.softmax(1)), rtol=1e-5, atol=0)


@on_backends("distillation_loss", cases=each_kernel())
def test_soft_cross_entropy_of_a_class_that_both_rule_out(backend, case):
    z, p = torch.zeros(2, case.classes), torch.full((2, case.classes), 1 / (case.classes - 1))
    z[:, 1], p[:, 1] = -math.inf, 0
    loss = soft_cross_entropy(*on(backend.device, z, p)).item()
    torch.testing.assert_close(loss, math.log(case.classes - 1), rtol=1e-5, atol=0)


def test_standardize_leaves_the_hard_term_on_the_logits_as_they_are():
    torch.manual_seed(9)
    z, t, y = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20) * 9, torch.randint(0, 20, (6,))
    result = distillation_loss(z, t, y, temperature=2.0, standardize=True, hard_weight=0.5)
    expected = distillation_loss(z, t, temperature=2.0, standardize=True) + 0.5 * F.cross_entropy(z, y)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, z)[0], torch.autograd.grad(expected, z)[0])
