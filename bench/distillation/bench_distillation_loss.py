"""The distillation loss, forward and backward, against torch.

T = 4, soft and hard terms, everyone from raw logits. ``eager`` is what pipelines write today (log_softmax, softmax,
kl_div, cross_entropy); ``compiled`` is torch.compile of the same; ``liger`` (GPU only) is log_softmax and softmax, then
LigerKLDIVLoss, times T^2, plus cross_entropy.
"""

import functools

import pytest
import torch
import torch.utils.benchmark

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall

TEMPERATURE, HARD = 4.0, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 10: image classes, rows shorter than two vectors; 100: a few vectors; 1000: a row is 4 KB, in L1; 50000 rows of 10:
# a whole epoch of soft labels at once.
ON_CPU = [((4096, 10), "float32"), ((4096, 100), "float32"), ((4096, 1000), "float32"), ((50_000, 10), "float32")]
# 1024x10, 4096x100: launches and host; 65536x1000: memory bandwidth, rows in registers; 128256: a vocabulary.
ON_GPU = [((1024, 10), "float32"), ((4096, 100), "float32"), ((65_536, 1000), "float32")]
ON_GPU += [((65_536, 1000), "bfloat16"), ((8192, 128_256), "bfloat16")]
CASES = ON_GPU if DEVICE == "cuda" else ON_CPU


def eager(student, teacher, labels):
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    soft = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    return TEMPERATURE**2 * soft + HARD * torch.nn.functional.cross_entropy(student, labels)


def routed(student, teacher, labels, kl_div):
    """The route of a library whose divergence starts from log-probabilities and probabilities."""
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    return TEMPERATURE**2 * kl_div(log_q, p) + HARD * torch.nn.functional.cross_entropy(student, labels)


def fused(student, teacher, labels):
    return kr_fast.distillation_loss(student, teacher, labels, temperature=TEMPERATURE, hard_weight=HARD)


def by_backend(backend, *tensors):
    with registry.forced(backend):
        return fused(*tensors)


def loss_of(provider):
    """The provider's loss; skips with the reason where it cannot run."""
    if provider in ("kr_fast cuda", "kr_fast triton"):
        backend = provider.split()[1]
        why = registry.refusal("distillation_loss", backend, ClassesCall(DEVICE, torch.float32))
        if why:
            pytest.skip(why)
        return functools.partial(by_backend, backend)
    if provider == "liger":
        if DEVICE != "cuda":
            pytest.skip("liger needs a GPU")
        kl_div = pytest.importorskip("liger_kernel.transformers.kl_div", reason="liger needs liger-kernel")
        return functools.partial(routed, kl_div=kl_div.LigerKLDIVLoss(reduction="batchmean"))
    return {"eager": eager, "compiled": torch.compile(eager), "kr_fast": fused}[provider]


def forward_backward(loss, student, teacher, labels):
    student.grad = None
    loss(student, teacher, labels).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def gradient_error(student, teacher, labels, rows=64):
    """Relative error of the first rows' gradient against the definition in float64."""
    exact = student.detach()[:rows].double().requires_grad_()
    eager(exact, teacher[:rows].double(), labels[:rows]).backward()
    expected = exact.grad * (len(exact) / len(student))
    return float((student.grad[:rows].double() - expected).norm() / expected.norm())


@functools.cache
def copy_bandwidth():
    """Bytes a second, read and written, of a copy of 256 MiB on the device."""
    source = torch.empty(1 << 26, device=DEVICE).normal_()
    into = torch.empty_like(source)
    timer = torch.utils.benchmark.Timer("into.copy_(source)", globals={"into": into, "source": source})
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=0.3).median


def test_route_is_the_same_loss():
    """What liger is handed, with torch's divergence in its place, on any machine."""
    student, teacher, labels = torch.randn(32, 10), torch.randn(32, 10), torch.randint(0, 10, (32,))
    kl_div = torch.nn.KLDivLoss(reduction="batchmean")
    torch.testing.assert_close(routed(student, teacher, labels, kl_div), fused(student, teacher, labels))


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=lambda value: str(value).replace(", ", "x"))
@pytest.mark.parametrize("provider", ["eager", "compiled", "liger", "kr_fast", "kr_fast cuda", "kr_fast triton"])
def test_distillation_loss(benchmark, shape, dtype, provider):
    benchmark.group = f"distillation_loss {shape[0]}x{shape[1]} {dtype} {DEVICE}"
    rows, classes = shape
    loss = loss_of(provider)
    torch.manual_seed(0)
    teacher = torch.randn(rows, classes, device=DEVICE, dtype=getattr(torch, dtype)).mul_(2)
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device=DEVICE)
    # Right first. torch and liger round log q to bfloat16, which costs them percents.
    arguments = loss, student, teacher, labels
    forward_backward(*arguments)
    error = gradient_error(student, teacher, labels)
    assert error <= (1e-5 if dtype == "float32" else 5e-3 if provider == "kr_fast" else 5e-2)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(*arguments)
        benchmark.extra_info["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    big = teacher.nbytes > 2**28
    times = {"rounds": 20, "iterations": 1, "warmup_rounds": 3} if big else {}
    benchmark.pedantic(forward_backward, arguments, **{"rounds": 50, "iterations": 5, "warmup_rounds": 10} | times)
    moved = 3 * teacher.nbytes  # both logits read, the gradient written: the least there is
    rate = moved / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "gradient_error": error,
        "bytes": moved,
        "gb_per_s": round(rate / 1e9, 1),
        "percent_of_copy": round(100 * rate / copy_bandwidth(), 1),
    }
