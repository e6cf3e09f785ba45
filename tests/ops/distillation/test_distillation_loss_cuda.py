"""The CUDA kernels of distillation_loss against float64, on a GPU and, every thread a fiber, without.

Class counts by regime. One thread a row: 2 smallest, 3, 10, 31 odd and even rows in shared memory, 32 last. Lanes of a
warp: 33 first of 8 lanes, 64 last, 65 and 128 with 16, 100 rows of half precision that are not 16-byte aligned; a whole
warp: 129, 256, 257, 512, 513, 1000, 1024. A block: 1025, 2049, 4097, 8192, 8193, 16384 last in registers. Two sweeps:
16385, and 33001, several tiles and odd rows.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_cases import CLASSES, DTYPES, EVERYTHING, GRAD_TOLERANCE, LONG, check, close, draw, on_both, oracle

import kr_fast
from kr_fast.ops.distillation.distillation_loss import distillation_loss


@pytest.mark.parametrize("classes", CLASSES + LONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(cuda_device, classes, dtype):
    z, t, y = draw(classes, dtype)
    y[1] = -100
    weight = torch.rand(len(z))
    check(cuda_device, z, t)
    for reduction in ("mean", "sum", "none"):
        check(cuda_device, z, t, y, weight=weight, reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_dtypes_of_student_and_teacher_are_independent(cuda_device, classes, dtype, target_dtype):
    check(cuda_device, *draw(classes, dtype, target_dtype), **EVERYTHING)


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [2, 10, 33, 1000, 1025, 16385])
@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_kinds_of_target(cuda_device, classes, kind):
    z, t, y = draw(classes, kind=kind)
    check(cuda_device, z, t, y, kind=kind, **EVERYTHING)
    check(cuda_device, z, t, y, kind=kind, soft=0.0, hard=1.0)
    check(cuda_device, z, t, kind=kind, T=3.0)


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [10, 32, 33, 50, 100, 256, 1000, 1028, 16386])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 4])  # in elements: accesses of 16, 8 and fewer bytes
@pytest.mark.parametrize("gap", [0, 1, 8])  # between rows
def test_row_strides_and_misaligned_bases(cuda_device, classes, dtype, offset, gap):
    z, t, y = draw(classes, dtype, rows=3)
    wide = torch.full((2, 4 * (classes + gap) + 8), math.nan, dtype=dtype).to(cuda_device)
    views = []
    for buffer, values in zip(wide, (z, t), strict=True):
        view = buffer[offset:].as_strided((3, classes), (classes + gap, 1))
        views.append(view.copy_(values))
    leaf, exact = views[0].detach().requires_grad_(), z.double().requires_grad_()
    loss = distillation_loss(leaf, views[1], y.to(cuda_device), temperature=2.0, hard_weight=0.5)
    wanted = oracle(exact, t, y, T=2.0, hard=0.5)
    loss.backward()
    wanted.backward()
    close(loss, wanted, 1e-6)
    close(leaf.grad, exact.grad, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 7, 257])
@pytest.mark.parametrize("classes", [10, 100, 130])
def test_any_number_of_rows(cuda_device, rows, classes):
    z, t, y = draw(classes, rows=rows)
    if rows:
        return check(cuda_device, z, t, y, **EVERYTHING)
    z = z.to(cuda_device).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = distillation_loss(z, t.to(cuda_device), y.to(cuda_device), reduction=reduction)
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, classes)


@pytest.mark.parametrize("classes", [10, 100, 1025])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperatures(cuda_device, classes, temperature):
    check(cuda_device, *draw(classes), T=temperature, hard=0.5)


@pytest.mark.parametrize("classes", [2, 10, 33, 100, 1000, 1025, 16385])
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_dkd(cuda_device, classes, hard):
    z, t, y = draw(classes, rows=7)
    y[1] = -100
    z[2, y[2]] += 30
    found = on_both(
        cuda_device, lambda z, d: kr_fast.dkd_loss(z, t.to(d), y.to(d), temperature=4.0, hard_weight=hard), z
    )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 3e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [5, 33, 100, 1000, 1025, 16385])
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
def test_top_k(cuda_device, classes, tail):
    z, t, y = draw(classes, rows=5)
    values, indices = t.softmax(1).topk(4)

    def loss(z, d):
        return kr_fast.distillation_loss_topk(
            z, values.to(d), indices.to(d), y.to(d), tail=tail, temperature=2.0, hard_weight=0.5
        )

    found = on_both(cuda_device, loss, z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 2e-6)


@pytest.mark.parametrize("classes", [5, 33, 1000, 1025, 16385])
def test_soft_cross_entropy(cuda_device, classes):
    z, t, _ = draw(classes, rows=5, kind="probs")
    t[0] = F.one_hot(torch.tensor(1), classes)
    found = on_both(cuda_device, lambda z, d: kr_fast.soft_cross_entropy(z, t.to(d), temperature=2.0), z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_no_further_off_than_torch(cuda_device, dtype, classes, noise):
    torch.manual_seed(classes)
    t = torch.randn(256, classes).mul(2)
    z, t = (t + noise * torch.randn_like(t)).to(dtype), t.to(dtype)

    def by_torch(z, t):
        return 16 * F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")

    def errors(loss, z, t):
        leaf, exact = z.clone().requires_grad_(), z.cpu().double().requires_grad_()
        found, wanted = loss(leaf, t), by_torch(exact, t.cpu().double())
        found.backward()
        wanted.backward()
        off = torch.linalg.norm(leaf.grad.cpu().double() - exact.grad) / torch.linalg.norm(exact.grad)
        return (abs(found.detach().cpu().double() - wanted) / wanted).item(), off.item()

    ours = errors(lambda z, t: distillation_loss(z, t, temperature=4.0), z.to(cuda_device), t.to(cuda_device))
    theirs = errors(by_torch, z, t)
    # Rounding of the result itself is granted: one in 2^23 of the value; of the gradient that of its dtype.
    assert ours[0] <= theirs[0] + 3e-7
    assert ours[1] <= 1.1 * theirs[1] + 3e-7


def test_small_divergences_are_exact_and_never_negative(cuda_device):
    """KL of 3e-4 to 1e-9, where p (ln p - ln q) loses its digits."""
    for classes in (10, 1000):
        torch.manual_seed(2)
        t = torch.randn(64, classes)
        for noise, tolerance in ((2.4e-2, 5e-7), (1e-3, 1e-5)):
            z = t + noise * torch.randn(64, classes)
            rows = distillation_loss(z.to(cuda_device), t.to(cuda_device), reduction="none")
            assert (rows >= 0).all()
            close(rows.mean(), oracle(z.double(), t), tolerance)


def test_half_precision_gradient_survives_a_loss_scale(cuda_device):
    """GradScaler's 65536 is folded in before the gradient is rounded: nothing is flushed to zero."""
    z, t = torch.randn(1024, 100).half(), torch.randn(1024, 100).half()
    exact, leaf = z.double().requires_grad_(), z.to(cuda_device).requires_grad_()
    (distillation_loss(leaf, t.to(cuda_device), temperature=4.0) * 65536).backward()
    (oracle(exact, t, T=4.0) * 65536).backward()
    assert (leaf.grad == 0).float().mean() < 1e-3
    close(leaf.grad, exact.grad, 1e-3)
