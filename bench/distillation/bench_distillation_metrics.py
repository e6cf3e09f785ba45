"""distillation_metrics against torch, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F

import kr_fast

SHAPES = [(4096, 10), (4096, 100), (4096, 1000)]
T = 4.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(student, teacher, labels):
    log_q, log_p, log_t = F.log_softmax(student / T, 1), F.log_softmax(teacher / T, 1), F.log_softmax(teacher, 1)
    kl, p = T * T * (log_p.exp() * (log_p - log_q)).sum(1), log_t.exp()
    first, first_t = student.argmax(1), teacher.argmax(1)
    return (
        kl,
        first == first_t,
        p.amax(1),
        -(p * log_t).sum(1),
        F.cross_entropy(student, labels, reduction="none"),
        first == labels,
        first_t == labels,
    )


def fused(student, teacher, labels):
    return kr_fast.distillation_metrics(student, teacher, labels, temperature=T)


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("provider", ["eager", "compiled", "kr_fast"])
def test_distillation_metrics(benchmark, shape, provider):
    benchmark.group = f"distillation_metrics {shape[0]}x{shape[1]} {DEVICE}"
    torch.manual_seed(0)
    teacher = 2 * torch.randn(shape, device=DEVICE)
    student, labels = teacher + torch.randn_like(teacher), torch.randint(0, shape[1], shape[:1], device=DEVICE)
    run = {"eager": eager, "compiled": torch.compile(eager), "kr_fast": fused}[provider]

    def measure():
        result = run(student, teacher, labels)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    # Right first: against the same in float64.
    for ours, exact in zip(measure(), eager(student.double(), teacher.double(), labels), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-4)
    benchmark.pedantic(measure, rounds=30, iterations=3, warmup_rounds=5)
