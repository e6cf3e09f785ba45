"""dkd_loss, forward and backward, against the way published code writes it."""

import pytest
import torch
import torch.nn.functional as F

import kr_fast

SHAPES = [(4096, 10), (4096, 100), (4096, 1000)]
ALPHA, BETA, T = 1.0, 8.0, 4.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(student, teacher, labels):
    mask = F.one_hot(labels, student.shape[1]).bool()
    q, p = F.softmax(student / T, 1), F.softmax(teacher / T, 1)
    two_q = torch.stack([(q * mask).sum(1), (q * ~mask).sum(1)], 1)
    two_p = torch.stack([(p * mask).sum(1), (p * ~mask).sum(1)], 1)
    target = F.kl_div(two_q.log(), two_p, reduction="batchmean")
    rest_q, rest_p = F.log_softmax(student / T - 1000 * mask, 1), F.softmax(teacher / T - 1000 * mask, 1)
    return T * T * (ALPHA * target + BETA * F.kl_div(rest_q, rest_p, reduction="batchmean"))


def fused(student, teacher, labels):
    return kr_fast.dkd_loss(student, teacher, labels, alpha=ALPHA, beta=BETA, temperature=T)


def forward_backward(loss, student, teacher, labels):
    student.grad = None
    loss(student, teacher, labels).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("provider", ["eager", "compiled", "kr_fast"])
def test_dkd_loss(benchmark, shape, provider):
    benchmark.group = f"dkd_loss {shape[0]}x{shape[1]} {DEVICE}"
    torch.manual_seed(0)
    teacher = 2 * torch.randn(shape, device=DEVICE)
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    labels = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    loss = {"eager": eager, "compiled": torch.compile(eager), "kr_fast": fused}[provider]
    # Right first: against the same in float64.
    exact = student.detach().double().requires_grad_()
    eager(exact, teacher.double(), labels).backward()
    forward_backward(loss, student, teacher, labels)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * float(exact.grad.abs().max()))
    benchmark.pedantic(forward_backward, (loss, student, teacher, labels), rounds=30, iterations=3, warmup_rounds=5)
