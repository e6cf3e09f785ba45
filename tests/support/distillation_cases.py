"""One table of cases of distillation_loss for every backend, its float64 oracle, and comparisons."""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the gradient to its dtype, and in float32 what exponentials and sums cost.
GRAD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
EVERYTHING = {"T": 4.0, "soft": 0.7, "hard": 0.3, "smoothing": 0.1}
# class count -> the regime of a kernel that it is the first, the last or a middle of
REGIMES = {
    2: "smallest",
    3: "odd rows in shared memory",
    10: "rows across lanes, several a program",
    31: "thread a row, odd",
    32: "thread a row, last",
    33: "8 lanes a row, first",
    64: "8 lanes, last",
    65: "16 lanes, first",
    100: "half-precision rows that are not 16-byte aligned",
    128: "C++ across lanes, last; 16 lanes, last",
    129: "C++ by rows, first; a warp, first",
    256: "8 elements a lane, last",
    257: "16 elements a lane, first",
    512: "16 elements a lane, last",
    513: "32 elements a lane, first",
    1000: "no power of two, whole AVX2 vectors",
    1024: "one summation block of C++; a warp, last",
    1025: "two summation blocks; a block of threads, first",
    2048: "one whole block of Triton",
    2049: "two blocks of Triton",
    4097: "several summation blocks and a tail",
    8192: "registers of a block, half",
    8193: "registers of a block, more than half",
    16384: "rows in registers, last",
    16385: "two sweeps or a cluster; longer blocks of Triton",
    33001: "several tiles and odd rows",
}
CLASSES = tuple(REGIMES)
FEW = (2, 10, 33, 100, 129, 1000, 1025, 2049, 16385)  # one of each kernel


class Case(NamedTuple):
    """Logits ``[rows_of(classes), classes]``, options as :func:`oracle` names them, and the regime that they reach."""

    classes: int
    why: str
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  (never written into)

    @property
    def tolerance(self) -> float:
        return GRAD_TOLERANCE[self.dtype]

    def __str__(self) -> str:
        given = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.classes}-{self.dtype}-{self.target_dtype or self.dtype}-{given}".replace("torch.", "")


CASES = [Case(classes, why, options=EVERYTHING) for classes, why in REGIMES.items()]
CASES += [Case(n, "each dtype", dtype, options=EVERYTHING) for dtype in DTYPES[1:] for n in FEW]
CASES += [Case(n, "the soft term alone") for n in FEW]
CASES += [Case(n, "probabilities", options=EVERYTHING | {"kind": k}) for k in ("probs", "log_probs") for n in FEW]
CASES += [Case(n, "the hard term alone", options={"soft": 0.0, "hard": 1.0}) for n in (10, 1000, 16385)]
# The hard term's sum is a power of the soft one's at 1, 2 and 4.
CASES += [Case(n, "T", options={"T": T, "hard": 0.5}) for T in (0.5, 1.0, 2.0, 7.0, 20.0) for n in (10, 100, 1025)]
CASES += [
    Case(n, "dtypes of student and teacher are independent", a, b, EVERYTHING)
    for n in (10, 100, 1000)
    for a in DTYPES
    for b in DTYPES
    if a != b
]
# Every tile has a template of its own in half precision.
TILES = [Case(n, REGIMES[n], dtype, options=EVERYTHING) for dtype in DTYPES[1:] for n in CLASSES if n not in FEW]


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
