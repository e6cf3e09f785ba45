"""dkd_loss against its definition in float64, values and gradients apart.

Class counts: 2 leaves one other class; 10 a part of a vector; 100 and 1000 several with and without a tail; 1025 two
summation blocks.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import kr_fast
from kr_fast.backends import registry
from kr_fast.ops.distillation.dkd_loss import dkd_loss

CLASSES = (2, 10, 100, 1000, 1025)


def oracle(z, t, y, alpha, beta, T, hard=0.0):
    """The paper's equations, row by row: two outcomes, and the softmax over the other classes."""
    z, t = z.double(), t.double()
    rows = []
    for i in range(len(z)):
        rest = torch.arange(z.shape[1]) != y[i]
        q, p = F.softmax(z[i] / T, 0), F.softmax(t[i] / T, 0)
        two_q, two_p = torch.stack([q[y[i]], q[rest].sum()]), torch.stack([p[y[i]], p[rest].sum()])
        log_q, log_p = F.log_softmax(z[i][rest] / T, 0), F.log_softmax(t[i][rest] / T, 0)
        target = (two_p * (two_p.log() - two_q.log())).sum()
        rest_kl = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum()
        rows.append(T * T * (alpha * target + beta * rest_kl))
    return torch.stack(rows) + hard * F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1.0, 3.0, 4.0])
def test_values_and_gradients(isa, classes, dtype, T):
    torch.manual_seed(classes)
    z, t = torch.randn(17, classes).mul(2).to(dtype), torch.randn(17, classes).mul(2)
    y, weight = torch.randint(0, classes, (17,)), torch.rand(17)
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    found = dkd_loss(leaf, t, y, temperature=T, alpha=0.7, beta=3.0, hard_weight=0.4, sample_weight=weight)
    wanted = (weight.double() * oracle(exact, t, y, 0.7, 3.0, T, 0.4)).sum() / weight.double().sum()
    assert abs(found.double() - wanted) <= 2e-6 * wanted
    found.backward()
    wanted.backward()
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert torch.linalg.norm(leaf.grad.double() - exact.grad) <= tolerance * torch.linalg.norm(exact.grad)
    assert leaf.grad.dtype == dtype


def test_alpha_1_and_beta_1_minus_p_is_the_whole_divergence(isa):
    torch.manual_seed(1)
    t, y = torch.randn(1, 10), torch.tensor([3])
    z = torch.randn(1, 10)
    beta = 1 - F.softmax(t / 2, 1)[0, 3].item()
    whole = kr_fast.distillation_loss(z, t, temperature=2.0)
    torch.testing.assert_close(dkd_loss(z, t, y, alpha=1.0, beta=beta, temperature=2.0), whole, rtol=3e-6, atol=0)


@pytest.mark.parametrize("classes", [10, 200])
def test_a_sure_student_keeps_its_digits(isa, classes):
    """1 - q_y of 1e-13 to 1e-40, where a subtraction from 1 gives 0 and a masked softmax NaN."""
    for gap in (30.0, 90.0):
        t = torch.zeros(3, classes)
        z, y = torch.randn(3, classes), torch.tensor([0, 1, 2])
        z[range(3), y] += gap
        leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        found = dkd_loss(leaf, t, y, temperature=1.0, beta=1.0)
        wanted = oracle(exact, t, y, 1.0, 1.0, 1.0).mean()
        assert abs(found.double() - wanted) <= 2e-6 * wanted
        found.backward()
        wanted.backward()
        assert torch.linalg.norm(leaf.grad.double() - exact.grad) <= 5e-6 * torch.linalg.norm(exact.grad)


@pytest.mark.parametrize("classes", [7, 300])
def test_equal_logits_give_exactly_zero(isa, classes):
    t = torch.randn(5, classes) * 4
    z = t.clone().requires_grad_()
    loss = dkd_loss(z, t, torch.arange(5), temperature=3.0)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().max() == 0


def test_ignored_rows_cost_nothing_and_reductions(isa):
    z, t, y = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.tensor([0, 1, -100, 3, 4])
    rows = dkd_loss(z, t, y, reduction="none")
    keep = [0, 1, 3, 4]
    wanted = oracle(z.detach()[keep], t[keep], y[keep], 1.0, 8.0, 4.0)
    torch.testing.assert_close(rows[keep].double(), wanted, rtol=2e-6, atol=0)
    assert rows[2] == 0
    torch.testing.assert_close(dkd_loss(z, t, y), rows.sum() / 4)
    torch.testing.assert_close(dkd_loss(z, t, y, reduction="sum"), rows.sum())
    rows.sum().backward()
    assert z.grad[2].abs().max() == 0


def test_the_reference_refuses_labels_too():
    with registry.forced("reference"), pytest.raises(ValueError, match=r"dkd_loss: labels must be in .0, 4\)"):
        dkd_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 4]))


@pytest.mark.parametrize("classes", [8, 200])
def test_an_infinite_upstream_gradient_does_not_reach_an_ignored_row(isa, classes):
    z, t, y = torch.randn(3, classes, requires_grad=True), torch.randn(3, classes), torch.tensor([0, -100, 2])
    for loss in (
        dkd_loss,
        lambda *rows, reduction: kr_fast.distillation_loss(*rows, hard_weight=1, reduction=reduction),
    ):
        grad = torch.autograd.grad(loss(z, t, y, reduction="none"), z, torch.tensor([1.0, math.inf, 1.0]))[0]
        assert grad[1].abs().max() == 0
        assert torch.isfinite(grad).all()


def test_gradcheck_and_reference_agree():
    z, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, t, y, hard_weight=0.3), z)
    z, t = z.detach().float(), t.float()
    with registry.forced("reference"):
        wanted = dkd_loss(z, t, y, hard_weight=0.3)
    torch.testing.assert_close(dkd_loss(z, t, y, hard_weight=0.3), wanted)


def test_full_graph_compile():
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.randint(0, 10, (5,))
    compiled = torch.compile(lambda z: dkd_loss(2 * z, t, y), fullgraph=True, backend="aot_eager")
    leaf, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(leaf).backward()
    dkd_loss(2 * plain, t, y).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, TypeError, "dkd_loss: labels must be given where the loss is decoupled"),
        ({"labels": torch.tensor([0, 1, 4])}, ValueError, r"dkd_loss: labels must be in \[0, 4\)"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1.0"),
        ({"beta": math.inf}, ValueError, "beta must be at least 0 and finite, got inf"),
        ({"target": torch.zeros(3, 5)}, ValueError, "target must have input's shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"input": torch.zeros(3, 4), "target": torch.zeros(3, 4), "labels": torch.tensor([0, 1, 3])}
    with pytest.raises(error, match=message):
        dkd_loss(**(arguments | change))
