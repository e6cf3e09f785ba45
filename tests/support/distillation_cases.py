"""One table of cases of distillation_loss for every backend, its float64 oracle, and comparisons."""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kr_fast.backends import native
from kr_fast.ops.distillation.distillation_loss import distillation_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the gradient to its dtype, and in float32 what exponentials and sums cost.
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
EVERYTHING = {"T": 4.0, "soft": 0.7, "hard": 0.3, "smoothing": 0.1}
# class count -> (backends where it is the first, the last or a middle of a kernel's regime; which regime)
REGIMES = {
    2: ("cpu cuda triton", "the fewest"),
    3: ("cuda", "odd rows in shared memory"),
    7: ("cuda", "thread a row, 8 registers"),
    10: ("reference cpu cuda triton", "rows across lanes, several a program; 12 registers"),
    16: ("cuda", "16 registers"),
    24: ("cuda", "24 registers"),
    31: ("cuda", "thread a row, odd"),
    32: ("cuda", "thread a row, last"),
    33: ("cuda", "8 lanes a row, first"),
    64: ("cuda", "8 lanes, last"),
    65: ("cuda", "16 lanes, first"),
    100: ("cpu cuda triton", "half-precision rows that are not 16-byte aligned"),
    128: ("cpu cuda", "C++ across lanes, last; 16 lanes, last"),
    129: ("cpu cuda", "C++ by rows, first; a warp, first"),
    256: ("cuda", "8 elements a lane, last"),
    257: ("cuda", "16 elements a lane, first"),
    512: ("cuda", "16 elements a lane, last"),
    513: ("cuda", "32 elements a lane, first"),
    1000: ("reference cpu cuda triton", "no power of two, whole AVX2 vectors"),
    1024: ("cpu cuda", "one summation block of C++; a warp, last"),
    1025: ("cpu cuda", "two summation blocks; a block of threads, first"),
    2048: ("cuda triton", "one whole block of Triton; 8 elements a thread, last"),
    2049: ("cuda triton", "two blocks of Triton; 16 elements a thread, first"),
    4097: ("cuda", "32 elements a thread, first"),
    8192: ("cuda", "32 elements a thread, last"),
    8193: ("cuda", "512 threads, first"),
    16_384: ("cuda", "rows in registers, last"),
    16_385: ("cuda", "clusters of one block in half precision and of two in float32; rows that are not copied"),
    17_000: ("cpu cuda triton", "summation blocks and a tail; clusters that copy rows; longer blocks of Triton"),
    32_000: ("cuda", "clusters of two blocks and of four; whole vectors"),
    32_004: ("cuda", "a last vector of float32 that is not whole"),
    33_001: ("cuda", "several tiles and odd rows"),
}
EACH = (
    (10,),
    (100, "cuda"),
    (1000, "cpu", "cuda", "triton"),
    (1025, "cuda"),
    (2049, "triton"),
    (17_000, "cpu", "cuda"),
)


class Case(NamedTuple):
    """Logits ``[rows, classes]``, options as :func:`oracle` names them, and the regime that they reach."""

    classes: int
    why: str
    on: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  (never written into)
    rows: int | None = None  # rows_of(classes)
    clusters: bool = True  # of CUDA, which above 16,384 classes does without where the device has none

    @property
    def tolerance(self) -> float:
        return max(GRAD_TOLERANCE[self.dtype], 3e-6 if self.classes > 100_000 else 0)

    @contextlib.contextmanager
    def kernel_chosen(self):
        """With clusters, or without: see tests/support/backends.py."""
        if not self.clusters:
            native.cuda.distillation_loss_use_clusters(False)
        try:
            yield
        finally:
            if not self.clusters:
                native.cuda.distillation_loss_use_clusters(True)

    def draw(self):
        """Logits of student and teacher, and labels."""
        kind = self.options.get("kind", "logits")
        dtype = torch.float32 if kind != "logits" else self.target_dtype
        return draw(self.classes, self.dtype, dtype, kind, self.rows)

    def __str__(self) -> str:
        words = [self.classes if self.rows is None else f"{self.rows}x{self.classes}", self.dtype]
        words += [] if self.target_dtype is None else [self.target_dtype]
        words += [] if self.clusters else ["no clusters"]
        words += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join(map(str, words)).replace("torch.", "")


def case_at(classes: int, *on: str, **more) -> Case:
    """A case on the backends where its class count is a regime, or on these."""
    return Case(classes, REGIMES[classes][1], on or tuple(REGIMES[classes][0].split()), **more)


def each_kernel(**more) -> list[Case]:
    """Of the kernels of each backend one case: what differs in the size of a tile alone is in the table of values."""
    return [case_at(n, *on, **more) for n, *on in EACH] + [case_at(17_000, "cuda", clusters=False, **more)]


CASES = [case_at(n, dtype=dtype, options=EVERYTHING) for n in REGIMES for dtype in DTYPES]
CASES += [  # sweeps over a row: 4 and 2 bytes at a time, 16, and a last vector that is not whole
    case_at(n, "cuda", dtype=dtype, options=EVERYTHING, clusters=False)
    for n in (16_385, 32_000, 32_004)
    for dtype in DTYPES
]
CASES += each_kernel()  # the soft term alone
CASES += each_kernel(options={"soft": 0.0, "hard": 1.0})
for kind in ("probs", "log_probs"):
    CASES += each_kernel(options=EVERYTHING | {"kind": kind})
    CASES += [case_at(33_001, options=EVERYTHING | {"kind": kind})]
CASES += [case_at(17_000, "cuda", options={"soft": 0.0, "hard": 1.0, "kind": "probs"})]
# The hard term's sum is a power of the soft one's at 1, 2 and 4; to Triton and torch, T is a number like any other.
for T in (0.5, 1.0, 2.0, 7.0, 20.0):
    CASES += [case_at(n, "cpu", "cuda", options={"T": T, "hard": 0.5}) for n in (10, 1025)]
    CASES += [case_at(n, "cuda", options={"T": T, "hard": 0.5}) for n in (100, 17_000)]
# The dtypes of student and teacher are independent.
for dtypes in [{"dtype": a, "target_dtype": b} for a in DTYPES for b in DTYPES if a != b]:
    CASES += [case_at(n, *on, **dtypes, options=EVERYTHING) for n, *on in ((10,), (1000, "cpu", "cuda"))]
    CASES += [case_at(n, "cuda", **dtypes, options=EVERYTHING) for n in (100, 17_000)]
# One row, and more than a block of threads takes; fewer rows than there are clusters, as many, and more than twice as
# many; one more than a block of Triton's reduction takes.
CASES += [case_at(n, rows=1, options=EVERYTHING) for n in (10, 100, 129)]
CASES += [case_at(n, "cpu", "cuda", rows=257, options=EVERYTHING) for n in (10, 100, 129)]
CASES += [case_at(17_000, "cuda", dtype=torch.bfloat16, rows=rows, options=EVERYTHING) for rows in (1, 2, 5)]
CASES += [case_at(3, "triton", rows=4097)]
VOCABULARIES = [
    (72_000, torch.bfloat16, "clusters of four blocks"),
    (128_256, torch.bfloat16, "of eight"),
    (128_256, torch.float32, "of eight that take a multiprocessor each"),
    (230_400, torch.float16, "of eight, two on a multiprocessor"),
    (256_000, torch.bfloat16, "of eight that take a multiprocessor each"),
    (256_000, torch.float32, "no cluster holds the row"),
]
CASES += [Case(n, why, ("cuda",), dtype, options=EVERYTHING, rows=2) for n, dtype, why in VOCABULARIES]
CASES += [Case(256_000, "the longest sums", ("cpu",), dtype, options={"T": 4.0}) for dtype in DTYPES[:2]]
CASES += [Case(128_256, "many blocks", ("triton-gpu",), dtype, options=EVERYTHING) for dtype in DTYPES]


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


def on(device, *tensors):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]


def check(device, z, t, y=None, *, tolerance=None, upstream=None, slack=0.0, **options):
    """Loss and gradient of distillation_loss against the oracle at the values that it reads."""
    names = [NAMES.get(name, name) for name in options]
    moved = dict(zip(names, on(device, *options.values()), strict=True))
    target, labels = on(device, t, y)
    t = t.cpu()
    compare(
        lambda z: distillation_loss(z, target, labels, **moved),
        lambda z: oracle(z, t, y, **options),
        z.to(device),
        tolerance,
        upstream=upstream,
        slack=slack,
    )


def compare(loss, exact_loss, z, tolerance=None, value_tolerance=1e-6, upstream=None, slack=0.0):
    """Value and gradient of ``loss(z)`` against float64, each by the norm of its error."""
    leaf, exact = z.detach().requires_grad_(), z.detach().cpu().double().requires_grad_()
    value, expected = loss(leaf), exact_loss(exact)
    if upstream is None:
        upstream = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    value.backward(upstream.to(value))
    expected.backward(upstream)
    assert leaf.grad.dtype == z.dtype
    close(value, expected, value_tolerance)
    close(leaf.grad, exact.grad, tolerance or GRAD_TOLERANCE[z.dtype], slack)


def close(result, expected, tolerance, slack=0.0):
    result, expected = result.detach().cpu().double(), expected.detach().cpu().double()
    assert torch.linalg.norm(result - expected) <= tolerance * torch.linalg.norm(expected) + slack + 1e-12
