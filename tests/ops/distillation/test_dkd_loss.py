"""dkd_loss, which is distillation_loss's kernel, against its definition in float64, values and gradients apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from distillation_cases import DTYPES, case_at, compare, draw, each_kernel, on

import kr_fast
from kr_fast.backends import registry
from kr_fast.ops.distillation.dkd_loss import dkd_loss

# One other class; a cluster whose rows are not copied; at 1, 2 and 4 the hard term's sum is a power of the soft one's.
CASES = [case for dtype in DTYPES for case in each_kernel(dtype=dtype)]
CASES += [case_at(2), case_at(16_385), case_at(10, options={"hard": 0.0}), case_at(1000, options={"hard": 0.0})]
CASES += [case_at(n, "cpu", "cuda", options={"T": T}) for T in (1.0, 2.0, 3.0) for n in (10, 1025)]
on_each_kernel = on_backends("distillation_loss", cases=each_kernel())
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


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


@on_backends("distillation_loss", cases=CASES)
def test_values_and_gradients(backend, case):
    z, t, y = draw(case.classes, case.dtype, torch.float32, rows=7)
    z[2, y[2]] += 30  # a sure student
    weight = torch.rand(7)
    T, hard = case.options.get("T", 4.0), case.options.get("hard", 0.4)
    options = {"temperature": T, "alpha": 0.7, "beta": 3.0, "hard_weight": hard}
    target, labels, w = on(backend.device, t, y, weight)
    interpreted = backend.id == "triton-interpreter"  # which cuts off where a GPU rounds to nearest
    compare(
        lambda z: dkd_loss(z, target, labels, sample_weight=w, **options),
        lambda z: (weight.double() * oracle(z, t, y, 0.7, 3.0, T, hard)).sum() / weight.double().sum(),
        z.to(backend.device),
        TOLERANCE[case.dtype] * (2 if interpreted else 1),
        2e-6,
    )


def test_alpha_1_and_beta_1_minus_p_is_the_whole_divergence(isa):
    torch.manual_seed(1)
    t, y = torch.randn(1, 10), torch.tensor([3])
    z = torch.randn(1, 10)
    beta = 1 - F.softmax(t / 2, 1)[0, 3].item()
    whole = kr_fast.distillation_loss(z, t, temperature=2.0)
    torch.testing.assert_close(dkd_loss(z, t, y, alpha=1.0, beta=beta, temperature=2.0), whole, rtol=3e-6, atol=0)


@on_each_kernel
def test_a_sure_student_keeps_its_digits(backend, case):
    """1 - q_y of 1e-13 to 1e-40, where a subtraction from 1 gives 0 and a masked softmax NaN."""
    for gap in (30.0, 90.0):
        t, y = torch.zeros(3, case.classes), torch.tensor([0, 1, 2])
        z = torch.randn(3, case.classes)
        z[range(3), y] += gap
        target, labels = on(backend.device, t, y)
        compare(
            lambda z, target=target, labels=labels: dkd_loss(z, target, labels, temperature=1.0, beta=1.0),
            lambda z, t=t, y=y: oracle(z, t, y, 1.0, 1.0, 1.0).mean(),
            z.to(backend.device),
            5e-6,
            2e-6,
        )


@on_each_kernel
def test_equal_logits_give_exactly_zero(backend, case):
    t = (torch.randn(5, case.classes) * 4).to(backend.device)
    z = t.clone().requires_grad_()
    loss = dkd_loss(z, t, torch.arange(5, device=t.device), temperature=3.0)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().max() == 0


@on_each_kernel
def test_ignored_rows_cost_nothing_and_reductions(backend, case):
    """Also under an infinite upstream gradient."""
    z, t, _ = draw(case.classes, rows=5)
    y = torch.tensor([0, 1, -100, 3, 4])
    keep = [0, 1, 3, 4]
    expected = oracle(z[keep], t[keep], y[keep], 1.0, 8.0, 4.0)
    z, t, y = on(backend.device, z, t, y)
    z.requires_grad_()
    rows = dkd_loss(z, t, y, reduction="none")
    torch.testing.assert_close(rows[keep].cpu().double(), expected, rtol=3e-6, atol=0)
    assert rows[2] == 0
    torch.testing.assert_close(dkd_loss(z, t, y), rows.sum() / 4)
    torch.testing.assert_close(dkd_loss(z, t, y, reduction="sum"), rows.sum())
    grad = torch.autograd.grad(rows, z, torch.tensor([1.0, 1, math.inf, 1, 1], device=z.device))[0]
    assert grad[2].abs().max() == 0
    assert torch.isfinite(grad).all()


def test_the_reference_refuses_labels_too():
    with registry.forced("reference"), pytest.raises(ValueError, match=r"dkd_loss: labels must be in .0, 4\)"):
        dkd_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 4]))


def test_gradcheck():
    z, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, t, y, hard_weight=0.3), z)


def test_standardize_against_its_definition():
    """The divergences of (z - mean) / std of each row; the cross-entropy of the logits as they are."""
    z, t = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), 9 * torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 0])

    def norm(x):
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)

    result = dkd_loss(z, t, y, temperature=2.0, hard_weight=0.4, standardize=True)
    expected = oracle(norm(z), norm(t), y, 1.0, 8.0, 2.0).mean() + 0.4 * F.cross_entropy(z, y)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, z)[0], torch.autograd.grad(expected, z)[0])


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
