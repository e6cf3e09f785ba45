"""Cases and comparisons for the CUDA kernels of distillation_loss."""

import contextlib

import torch
import torch.nn.functional as F

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss

CLASSES = (2, 3, 10, 31, 32, 33, 64, 65, 100, 128, 129, 256, 257, 512, 513, 1000, 1024)
LONG = (1025, 2049, 4097, 8192, 8193, 16384, 16385, 33001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the gradient to its dtype, and in float32 what exponentials and sums cost.
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def rows_of(classes: int) -> int:
    """Several tiles or warps, and a last one that is not full; few of long rows, which a CPU walks slowly."""
    return 131 if classes <= 32 else 37 if classes <= 128 else 9 if classes <= 1024 else 3


def draw(classes, dtype=torch.float32, target_dtype=None, kind="logits", rows=None):
    torch.manual_seed(classes)
    n = rows_of(classes) if rows is None else rows
    z, t = 3 * torch.randn(n, classes), 3 * torch.randn(n, classes)
    t = {"logits": t, "probs": t.softmax(1), "log_probs": t.log_softmax(1)}[kind]
    return z.to(dtype), t.to(target_dtype or dtype), torch.randint(0, classes, (n,))


def oracle(z, t, y=None, *, T=1.0, kind="logits", soft=1.0, hard=0.0, smoothing=0.0, weight=None, reduction="mean"):
    """The docstring's formula in float64, by torch's own functions."""
    t = t.double()
    log_q = F.log_softmax(z / T, 1)
    log_p = {"logits": lambda: F.log_softmax(t / T, 1), "probs": t.log, "log_probs": lambda: t}[kind]()
    p = log_p.exp()
    rows = soft * T * T * torch.where(p > 0, p * (log_p - log_q), 0).sum(1)
    if hard:
        rows = rows + hard * F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing, ignore_index=-100)
    w = torch.ones(len(z), dtype=torch.float64) if weight is None else weight.double()
    if y is not None:
        w = torch.where(y == -100, 0, w)
    rows = torch.where(w == 0, 0, w * rows)
    return rows if reduction == "none" else rows.sum() / (w.sum() if reduction == "mean" else 1)


NAMES = {"T": "temperature", "kind": "target_type", "soft": "soft_weight", "hard": "hard_weight"}
NAMES |= {"smoothing": "label_smoothing", "weight": "sample_weight"}


def check(device, z, t, y=None, *, tolerance=None, upstream=None, **options):
    """Loss and gradient against the oracle at the values that ours reads, each by the norm of its error."""
    moved = {NAMES.get(k, k): v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours, exact = z.to(device).detach().requires_grad_(), z.double().requires_grad_()
    loss = distillation_loss(ours, t.to(device), None if y is None else y.to(device), **moved)
    wanted = oracle(exact, t, y, **options)
    if upstream is None:
        upstream = torch.linspace(0.5, 2, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    loss.backward(upstream.to(device, loss.dtype))
    wanted.backward(upstream)
    assert ours.grad.dtype == z.dtype
    close(loss, wanted, 1e-6)
    close(ours.grad, exact.grad, tolerance or GRAD_TOLERANCE[z.dtype])


def close(found, wanted, tolerance):
    found, wanted = found.detach().cpu().double(), wanted.detach().double()
    assert torch.linalg.norm(found - wanted) <= tolerance * torch.linalg.norm(wanted) + 1e-12


EVERYTHING = {"T": 4.0, "soft": 0.7, "hard": 0.3, "smoothing": 0.1}


def on_both(device, loss, z):
    """(value, gradient) on ours and, in float64, on the reference."""
    found = []
    for where in (device, None):
        leaf = (z.double() if where is None else z.to(where)).detach().clone().requires_grad_()
        with registry.forced("reference") if where is None else contextlib.nullcontext():
            value = loss(leaf, where or torch.device("cpu"))
            value.backward(torch.full_like(value, 3))
        found.append((value.detach().cpu().double(), leaf.grad.cpu().double()))
    return found
