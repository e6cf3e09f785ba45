"""The distillation loss, forward and backward, against torch.

T = 4, soft and hard terms, everyone from raw logits. ``eager`` is what pipelines write today (log_softmax, softmax,
kl_div, cross_entropy); ``compiled`` is torch.compile of the same; ``liger`` (GPU only) is log_softmax and softmax, then
LigerKLDIVLoss, times T^2, plus cross_entropy. The error is that of the first rows' gradient against float64.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.benchmarks.case import Case, Unavailable, Work, attempt, compiled, relative_error
from kr_fast.ops.distillation.distillation_loss import distillation_loss

TEMPERATURE, HARD, CHECKED = 4.0, 0.1, 64
# 10: image classes, rows shorter than two vectors; 100: a few vectors; 1000: a row is 4 KB, in L1; 50000 rows of 10:
# a whole epoch of soft labels at once.
ON_CPU = [((4096, 10), "float32"), ((4096, 100), "float32"), ((4096, 1000), "float32"), ((50_000, 10), "float32")]
# 1024x10, 4096x100: launches and host; 65536x1000: memory bandwidth, rows in registers; 128256: a vocabulary.
ON_GPU = [((1024, 10), "float32"), ((4096, 100), "float32"), ((65_536, 1000), "float32")]
ON_GPU += [((65_536, 1000), "bfloat16"), ((8192, 128_256), "bfloat16")]


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As it is written without a fused loss."""
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    soft = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    return TEMPERATURE**2 * soft + HARD * torch.nn.functional.cross_entropy(student, labels)


def routed(student: Tensor, teacher: Tensor, labels: Tensor, kl_div: Callable) -> Tensor:
    """The route of a library whose divergence starts from log-probabilities and probabilities."""
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    return TEMPERATURE**2 * kl_div(log_q, p) + HARD * torch.nn.functional.cross_entropy(student, labels)


def fused(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """By this package."""
    return distillation_loss(student, teacher, labels, temperature=TEMPERATURE, hard_weight=HARD)


def by_backend(backend: str, *tensors: Tensor) -> Tensor:
    """By one of its backends."""
    with registry.forced(backend):
        return fused(*tensors)


def loss_of(provider: str, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The provider's loss. Raises: Unavailable."""
    if provider in ("kr_fast cuda", "kr_fast triton"):
        backend = provider.split()[1]
        if why := registry.refusal("distillation_loss", backend, ClassesCall(device, torch.float32)):
            raise Unavailable(why)
        return functools.partial(by_backend, backend)
    if provider == "liger":
        try:
            from liger_kernel.transformers.kl_div import LigerKLDIVLoss
        except ImportError as error:
            raise Unavailable("needs liger-kernel") from error
        return functools.partial(routed, kl_div=LigerKLDIVLoss(reduction="batchmean"))
    return {"kr_fast": lambda: fused, "eager": lambda: eager, "compiled": lambda: compiled(eager)}[provider]()


def work(provider: str, shape: tuple[int, int], dtype: str, device: str) -> Work:
    """The same logits for all providers."""
    loss = loss_of(provider, device)
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    teacher = torch.randn(shape, dtype=getattr(torch, dtype), **options).mul_(2)
    student = (teacher + torch.randn(shape, dtype=teacher.dtype, **options)).requires_grad_()
    labels = torch.randint(0, shape[1], shape[:1], **options)

    def run() -> None:
        student.grad = None
        loss(student, teacher, labels).backward()

    attempt(run) if provider == "compiled" else run()
    exact = student.detach()[:CHECKED].double().requires_grad_()
    eager(exact, teacher[:CHECKED].double(), labels[:CHECKED]).backward()
    return Work(run, relative_error(student.grad[:CHECKED], exact.grad * (len(exact) / len(student))))


def cases(device: str) -> list[Case]:
    """By numbers of rows and classes."""
    names = ("kr_fast", "eager", "compiled")
    if device == "cuda":
        names += ("liger", "kr_fast cuda", "kr_fast triton")
    found = []
    for shape, dtype in ON_GPU if device == "cuda" else ON_CPU:
        providers = {name: functools.partial(work, name, shape, dtype, device) for name in names}
        # torch and liger round log q to bfloat16, which costs them percents.
        allowed = 1e-5 if dtype == "float32" else {name: 5e-3 if "kr_fast" in name else 5e-2 for name in names}
        # Both logits read, the gradient written: the least there is.
        moved = 3 * shape[0] * shape[1] * getattr(torch, dtype).itemsize
        name = f"distillation_loss {shape[0]}x{shape[1]} {dtype} {device}"
        found.append(Case(name, providers, allowed, moved, device))
    return found
