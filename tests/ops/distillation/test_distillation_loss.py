"""distillation_loss against a float64 oracle on every backend: values and gradients apart, and edges of the numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from distillation_cases import CASES, DTYPES, GRAD_TOLERANCE, case_at, check, close, draw, each_kernel, on, oracle

from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad

on_each_kernel = on_backends("distillation_loss", cases=each_kernel())


@on_backends("distillation_loss", cases=CASES)
def test_values_and_gradients(backend, case):
    z, t, y = case.draw()
    if len(z) > 1:
        y[1] = -100
    interpreted = backend.id == "triton-interpreter"  # which cuts off where a GPU rounds to nearest, an ulp of bfloat16
    tolerance = case.tolerance * (2 if interpreted else 1)
    options = {"weight": torch.linspace(0.5, 1.5, len(z)), **case.options} if case.options else {}
    labels = y if case.options.keys() - {"T"} else None
    for reduction in ("mean",) if interpreted and case.classes > 10 else ("mean", "sum", "none"):
        check(backend.device, z, t, labels, tolerance=tolerance, reduction=reduction, **options)


def by_torch(z, t):
    return 16 * F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")


def errors(loss, z, t, device):
    """Relative errors of value and gradient against float64 at the same logits."""
    leaf, exact = z.to(device).detach().requires_grad_(), z.double().requires_grad_()
    value, expected = loss(leaf, t.to(device)), by_torch(exact, t.double())
    value.backward()
    expected.backward()
    off = torch.linalg.norm(leaf.grad.cpu().double() - exact.grad) / torch.linalg.norm(exact.grad)
    return (abs(value.detach().cpu().double() - expected) / expected).item(), off.item()


@on_backends("distillation_loss", "cpu", "cuda", cases=each_kernel())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_off_than_torch(backend, case, dtype):
    torch.manual_seed(case.classes)
    t = torch.randn(256 if case.classes <= 1000 else 4, case.classes).mul(2)
    for noise in (1.0, 0.1, 0.01):
        z = t + noise * torch.randn_like(t)
        ours = errors(lambda z, t: distillation_loss(z, t, temperature=4.0), *on(dtype, z, t), backend.device)
        theirs = errors(by_torch, *on(dtype, z, t), "cpu")
        # Rounding of the result itself is granted: one in 2^23 of the value; of the gradient that of its dtype.
        assert ours[0] <= theirs[0] + 3e-7, noise
        assert ours[1] <= 1.1 * theirs[1] + 3e-7, noise


@on_backends("distillation_loss", "cpu", "cuda", "triton", cases=each_kernel())
def test_small_divergences_are_exact_and_never_negative(backend, case):
    """KL of 3e-4 to 1e-9, where p (ln p - ln q) loses its digits: relative error 5e-7 and below."""
    torch.manual_seed(2)
    t = torch.randn({10: 256, 1000: 16}.get(case.classes, 3), case.classes)
    rounded = backend.name == "triton"  # ln p and ln q, before their difference is taken
    for noise, tolerance in ((2.4e-2, 5e-7), (1e-3, 2e-5 if rounded else 1e-5)):
        z = t + noise * torch.randn_like(t)
        rows = distillation_loss(*on(backend.device, z, t), reduction="none")
        assert (rows >= 0).all()
        close(rows.mean(), oracle(z.double(), t), tolerance)


@on_each_kernel
def test_rows_of_no_weight(backend, case):
    """Ignored, of weight 0, all of them; whatever they hold, and under an infinite upstream gradient."""
    z, t, y = draw(case.classes, rows=6)
    weight = torch.tensor([1.0, 1, 0, 2, 1, 0.5])
    y[4] = -100
    z[2], z[4], t[4] = math.inf, math.nan, math.nan
    keep = [0, 1, 3, 5]
    expected = oracle(z[keep].double(), t[keep], y[keep], hard=1.0, weight=weight[keep])
    z, t, y, weight = on(backend.device, z, t, y, weight)
    z.requires_grad_()
    loss = distillation_loss(z, t, y, hard_weight=1.0, sample_weight=weight)
    at_once = distillation_loss_and_grad(z, t, y, hard_weight=1.0, sample_weight=weight)
    for value, grad in ((loss, torch.autograd.grad(loss, z)[0]), at_once):
        close(value, expected, 1e-6)
        assert grad[[2, 4]].abs().max() == 0
        assert torch.isfinite(grad).all()
    rows = distillation_loss(z, t, y, sample_weight=weight, reduction="none")
    upstream = torch.tensor([1.0, 1, math.inf, 1, math.nan, 1], device=z.device)
    assert torch.autograd.grad(rows, z, upstream)[0][[2, 4]].abs().max() == 0
    for nothing in (
        distillation_loss(z, t, y, sample_weight=torch.zeros_like(weight)),
        distillation_loss(z, t, torch.full_like(y, -100), hard_weight=1.0),
    ):
        assert nothing.item() == 0
        assert torch.autograd.grad(nothing, z)[0].abs().max() == 0


@on_backends("distillation_loss", cases=[*each_kernel(), case_at(17_000, "cuda", dtype=torch.bfloat16)])
def test_infinite_logits(backend, case):
    z, t, _ = draw(case.classes, case.dtype, rows=8)
    masks = (0, case.classes - 1, slice(case.classes // 2, case.classes))  # one class, and a part of a vocabulary
    for row, mask in enumerate(masks):
        t[row, mask] = -math.inf  # the teacher rules classes out: they contribute q only
        z[3 + row, mask] = t[3 + row, mask] = -math.inf  # both: nothing
    t[6, 5], z[6, 5] = -30_000.0, -math.inf  # the student rules out what underflows in the teacher: nothing either
    z[7, 7] = -math.inf  # the student what the teacher does not: infinite
    rows = distillation_loss(*on(backend.device, z, t), reduction="none")
    assert rows[7].item() == math.inf
    z, t = z[:7], t[:7]
    q, p = z.double().softmax(1), t.double().softmax(1)
    expected = torch.where(p > 0, p * (p.log() - torch.where(p > 0, q, 1).log()), 0).sum(1)
    close(rows[:7], expected, 1e-6)
    loss, grad = distillation_loss_and_grad(*on(backend.device, z, t), reduction="sum")
    close(loss, expected.sum(), 1e-6)
    close(grad, q - p, GRAD_TOLERANCE[case.dtype])


@on_each_kernel
def test_zero_probabilities_and_nothing_where_sums_begin(backend, case):
    z, t, _ = draw(case.classes, rows=3)
    z[0, 2] = -math.inf  # where the teacher's probability is 0
    one_hot = F.one_hot(torch.tensor([1, 0, 3]), case.classes).float()
    loss = distillation_loss(*on(backend.device, z, one_hot), target_type="probs", reduction="none")
    close(loss, -z.double().log_softmax(1)[range(3), [1, 0, 3]], 1e-6)
    z[:, : case.classes - 2] = -math.inf
    log_p = F.pad(t[:, -2:].log_softmax(1), (case.classes - 2, 0), value=-math.inf)
    loss = distillation_loss(*on(backend.device, z, log_p), target_type="log_probs", reduction="none")
    p, log_q = log_p[:, -2:].double(), z[:, -2:].double().log_softmax(1)
    close(loss, (p.exp() * (p - log_q)).sum(1), 2e-6)


@on_each_kernel
def test_equal_logits_give_exactly_zero_and_nan_comes_through(backend, case):
    """A maximum drops NaN, so that logits gone wrong would look like a small loss."""
    z, t, y = on(backend.device, *draw(case.classes, rows=3))
    z = (z * 3).requires_grad_()
    loss = distillation_loss(z, z.detach().clone(), temperature=3.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].abs().max() == 0
    z = z.detach()
    for value in (math.nan, math.inf):
        bad = z.clone()
        bad[1, case.classes - 1] = value
        for pair in ((bad, t), (t, bad)):
            assert not math.isfinite(distillation_loss(*pair).item())
            assert distillation_loss(*pair, reduction="none").isfinite().tolist() == [True, False, True]
        hard = distillation_loss(bad, bad, y, soft_weight=0.0, hard_weight=1.0)
        assert not math.isfinite(hard.item())


@on_backends("distillation_loss", "cuda", "triton", cases=each_kernel())
def test_a_label_outside_poisons_its_row(backend, case):
    """On a device it cannot raise; where labels only say what counts, it does nothing."""
    z, t, y = on(backend.device, *draw(case.classes, rows=3))
    for label in (-1, case.classes, 2**40):
        y[1] = label
        rows = distillation_loss(z, t, y, hard_weight=1.0, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]
        assert not distillation_loss(z, t, y).isnan()


@on_each_kernel
def test_offsets_do_not_matter(backend, case):
    z, t, _ = draw(case.classes)
    z, t = ((x * 256).round() / 256 for x in (z, t))  # so that adding 10^4 is exact
    loss, grad = distillation_loss_and_grad(*on(backend.device, z, t))
    for offset in (1e4, -1e4):
        moved = distillation_loss_and_grad(*on(backend.device, z + offset, t - offset))
        close(moved[0], loss, 1e-6)
        close(moved[1], grad, 1e-6)
