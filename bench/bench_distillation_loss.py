"""The distillation loss, forward and backward, against torch: ``pytest bench/bench_distillation_loss.py``.

T = 4, soft and hard terms. ``eager`` is what pipelines write today (log_softmax, softmax, kl_div, cross_entropy);
``compiled`` is torch.compile of the same. On a GPU the same cases run there, in bfloat16 too.
"""

import pytest
import torch

import kr_fast

# 10: image classes, rows shorter than two vectors; 100: a few vectors; 1000: a row is 4 KB, in L1; 50000 rows of 10:
# a whole epoch of soft labels at once.
SHAPES = [(4096, 10), (4096, 100), (4096, 1000), (50_000, 10)]
TEMPERATURE, HARD = 4.0, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)


def eager(student, teacher, labels):
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    soft = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    return TEMPERATURE**2 * soft + HARD * torch.nn.functional.cross_entropy(student, labels)


def fused(student, teacher, labels):
    return kr_fast.distillation_loss(student, teacher, labels, temperature=TEMPERATURE, hard_weight=HARD)


def both_ways(loss, student, teacher, labels):
    student.grad = None
    loss(student, teacher, labels).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(params=SHAPES, ids="{0[0]}x{0[1]}".format)
def shape(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["eager", "compiled", "kr_fast"])
def test_distillation_loss(benchmark, shape, dtype, provider):
    benchmark.group = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {DEVICE}"
    rows, classes = shape
    torch.manual_seed(0)
    teacher = (2 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=DEVICE)
    loss = {"eager": eager, "compiled": torch.compile(eager), "kr_fast": fused}[provider]
    # Right first: against the definition in float64.
    exact = student.detach().double().requires_grad_()
    eager(exact, teacher.double(), labels).backward()
    both_ways(loss, student, teacher, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        student.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * float(exact.grad.abs().max())
    )
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(both_ways, (loss, student, teacher, labels), rounds=50, iterations=5, warmup_rounds=10)
