"""The siblings that share distillation_loss's kernel: top-k soft labels, soft cross-entropy, loss and gradient at once.

Class counts: 7 and 33 across lanes; 128 and 129 the last there and the first row-wise; 2000 two summation blocks.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kr_fast.ops.distillation.distillation_loss import (
    distillation_loss,
    distillation_loss_and_grad,
    distillation_loss_topk,
    soft_cross_entropy,
)

CLASSES = (7, 33, 128, 129, 2000)


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


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_topk_equals_its_dense_soft_labels(isa, classes, tail, dtype):
    torch.manual_seed(classes)
    z, y = torch.randn(19, classes), torch.randint(0, classes, (19,))
    values, indices = torch.randn(19, classes).mul(2).softmax(1).topk(5)
    values = values.to(dtype)
    if dtype != torch.float32:
        values = values * 0.9  # so that rounding does not bring a row above 1
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    found = distillation_loss_topk(leaf, values, indices, y, tail=tail, temperature=3.0, hard_weight=0.2)
    wanted = kl(dense(values, indices, classes, tail), exact, 3.0).mean() + 0.2 * F.cross_entropy(exact, y)
    assert abs(found.double() - wanted) <= 1e-6 * wanted
    found.backward()
    wanted.backward()
    assert torch.linalg.norm(leaf.grad.double() - exact.grad) <= 3e-6 * torch.linalg.norm(exact.grad)


def test_topk_of_all_classes_and_int32_indices(isa):
    z, p = torch.randn(4, 6), torch.randn(4, 6).softmax(1)
    values, indices = p.topk(6)
    for tail in ("smooth", "renorm"):
        found = distillation_loss_topk(z, values, indices.int(), tail=tail)
        torch.testing.assert_close(found, distillation_loss(z, p, target_type="probs"), rtol=2e-6, atol=1e-7)


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


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_against_torch(isa, classes, temperature):
    torch.manual_seed(classes)
    z, p = torch.randn(19, classes), torch.randn(19, classes).softmax(1)
    p[2] = F.one_hot(torch.tensor(1), classes)
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    found = soft_cross_entropy(leaf, p, temperature=temperature)
    wanted = temperature**2 * F.cross_entropy(exact / temperature, p.double())
    assert abs(found.double() - wanted) <= 1e-6 * wanted
    found.backward()
    wanted.backward()
    assert torch.linalg.norm(leaf.grad.double() - exact.grad) <= 3e-6 * torch.linalg.norm(exact.grad)
    logits = p.clamp_min(1e-9).log()
    torch.testing.assert_close(
        soft_cross_entropy(z, logits, target_type="logits"),
        soft_cross_entropy(z, logits.softmax(1)),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("classes", [5, 200])
def test_soft_cross_entropy_of_a_class_that_both_rule_out(isa, classes):
    z, p = torch.zeros(2, classes), torch.full((2, classes), 1 / (classes - 1))
    z[:, 1], p[:, 1] = -math.inf, 0
    torch.testing.assert_close(soft_cross_entropy(z, p).item(), math.log(classes - 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_grad_equals_autograd(dtype, reduction):
    torch.manual_seed(8)
    z, t, y = torch.randn(9, 12).to(dtype), torch.randn(9, 12).to(dtype), torch.randint(0, 12, (9,))
    options = {"temperature": 2.0, "hard_weight": 0.5, "reduction": reduction, "sample_weight": torch.rand(9)}
    leaf = z.clone().requires_grad_()
    wanted = distillation_loss(leaf, t, y, **options)
    wanted.backward()
    loss, grad = distillation_loss_and_grad(leaf, t, y, **options)
    assert not loss.requires_grad
    assert not grad.requires_grad
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(grad, leaf.grad)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        distillation_loss_and_grad(z, t, reduction="none")


def test_standardize_leaves_the_hard_term_on_the_logits_as_they_are():
    torch.manual_seed(9)
    z, t, y = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20) * 9, torch.randint(0, 20, (6,))
    found = distillation_loss(z, t, y, temperature=2.0, standardize=True, hard_weight=0.5)
    wanted = distillation_loss(z, t, temperature=2.0, standardize=True) + 0.5 * F.cross_entropy(z, y)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, z)[0])
