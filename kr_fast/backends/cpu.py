"""Kernels of ``kr_fast._cpu`` (C++, AVX2 or AVX-512 by run-time choice, plain C++ elsewhere).

Callers have checked their arguments; here outputs are allocated and addresses taken. The module loads on first import
and a failure is kept as the reason that ``kr-fast info`` prints and a forced call raises.
"""

import os

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.distillation_reference import public_name
from kr_fast.backends.membership_reference import PREDICATES, SIGNALS, VARIANCES
from kr_fast.backends.winograd_reference import ACTIVATIONS

try:
    from kr_fast import _cpu
except ImportError as error:
    _cpu = None
    registry.mark_unavailable("cpu", f"kr_fast._cpu cannot be loaded ({error}); reinstall with a C++17 compiler")

if _cpu is not None and os.environ.get("KR_FAST_CPU_ISA"):
    _cpu.set_isa(os.environ["KR_FAST_CPU_ISA"])


def isa() -> str | None:
    """The instruction set in use: "scalar", "avx2" or "avx512"; None where the module cannot be loaded."""
    return None if _cpu is None else _cpu.isa()


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbers of kr::Dtype


def accepts(*dtypes: torch.dtype):
    """A predicate: CPU tensors of one of ``dtypes``."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if device != "cpu":
            return f"tensors must be on cpu, got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses


@registry.kernel("philox_normal", "cpu", refuses=accepts(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32)
    _cpu.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), torch.get_num_threads())
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@registry.kernel("solver_step", "cpu", refuses=accepts(torch.float32))
def solver_step(
    sample, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies, out
) -> None:
    batch = len(sample)
    channels = sample.shape[1] if sample.ndim == 4 else 1
    model_output = model_output.float().contiguous()
    uncond_output = None if uncond_output is None else uncond_output.float().contiguous()
    _cpu.solver_step(
        sample.data_ptr(), model_output.data_ptr(), _address(uncond_output), _address(ids), _address(limits),
        [h.data_ptr() for h in history], row, guidance, seed, stream,
        batch, channels, sample.numel() // max(batch * channels, 1), _address(out.sample), _address(out.kept),
        _address(out.input), 0 if out.input is None else DTYPES[out.input.dtype], copies, _address(out.image),
        torch.get_num_threads(),
    )  # fmt: skip


@registry.kernel("pack_uint8", "cpu", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def pack_uint8(x: Tensor) -> Tensor:
    x = x.float()  # exact from half precision
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not channels_last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8)
    _cpu.pack_uint8(
        x.data_ptr(), batch, channels, height * width, channels_last, out.data_ptr(), torch.get_num_threads()
    )
    return out


def _elsewhere(device: str, dtype: torch.dtype, size: int) -> str | None:
    """The predicate of an op on the host whose dtype is fixed."""
    return None if device == "cpu" else f"tensors must be on cpu, got {device}"


@registry.kernel("encode_png", "cpu", refuses=_elsewhere)
def encode_png(images: Tensor, size: int) -> Tensor:
    images = images.contiguous()
    batch, height, width, channels = images.shape
    out = torch.empty(batch, size, dtype=torch.uint8)
    _cpu.encode_png(images.data_ptr(), batch, height, width, channels, out.data_ptr(), torch.get_num_threads())
    return out


# Numbers of kr::DistillationLoss::target_kind; top-k rows become probabilities.
TARGET_KINDS = {"logits": 0, "probs": 1, "log_probs": 2, "topk_smooth": 1, "topk_renorm": 1}
DIVERGENCES = {"kl": 0, "cross": 1, "decoupled": 2}  # of kr::Divergence


def _loss(
    input, target, indices, labels, weight,
    temperature, target_type, divergence, alpha, beta, soft, hard, smoothing, ignore_index,
    *, loss=False, row_loss=None, grad=None, upstream=None, mean=False,
) -> float:  # fmt: skip
    """What is wanted of one call, written to ``row_loss`` and ``grad``; the loss over all rows is returned."""
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    total, invalid = _cpu.distillation_loss(
        loss, _address(row_loss), _address(grad), _address(upstream),
        upstream.stride(0) if upstream is not None and upstream.ndim else 0, mean, torch.get_num_threads(),
        input.data_ptr(), target.data_ptr(), DTYPES[input.dtype], DTYPES[target.dtype], rows, classes,
        input.stride(0), target.stride(0), _address(labels), _address(weight),
        temperature, soft, hard, smoothing, ignore_index, TARGET_KINDS[target_type], _address(indices),
        target.shape[1], target_type == "topk_smooth", DIVERGENCES[divergence], alpha, beta,
    )  # fmt: skip
    if invalid >= 0:
        _refuse_row(public_name(target_type, divergence), invalid, classes, indices, labels, ignore_index)
    return total


def _refuse_row(op, row, classes, indices, labels, ignore_index):
    if labels is not None and not (0 <= int(labels[row]) < classes) and int(labels[row]) != ignore_index:
        rule, found = f"labels must be in [0, {classes}) or ignore_index {ignore_index}", int(labels[row])
    else:
        rule, found = f"indices must be in [0, {classes})", indices[row].tolist()
    raise ValueError(f"{op}: {rule}, got {found} in row {row}")


def _distillation_forward(input, target, indices, labels, weight, *parameters):
    *parameters, reduction = parameters
    rows = torch.empty(len(input), dtype=torch.float32) if reduction == "none" else None
    total = _loss(
        input, target, indices, labels, weight, *parameters, loss=True, row_loss=rows, mean=reduction == "mean"
    )
    loss = torch.scalar_tensor(total, dtype=torch.float32) if rows is None else rows
    return loss, torch.empty(0, 5), torch.ones(())  # nothing is kept for backward: it takes the exponentials again


def _distillation_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters) -> Tensor:
    *parameters, reduction = parameters
    grad = torch.empty(input.shape, dtype=input.dtype)
    upstream = upstream.float()
    _loss(input, target, indices, labels, weight, *parameters, grad=grad, upstream=upstream, mean=reduction == "mean")
    return grad


def _distillation_both(input, target, indices, labels, weight, *parameters) -> tuple[Tensor, Tensor, None]:
    *parameters, reduction = parameters
    # empty_like keeps the strides of logits that are not contiguous, but costs less
    grad = torch.empty_like(input) if input.is_contiguous() else torch.empty(input.shape, dtype=input.dtype)
    total = _loss(input, target, indices, labels, weight, *parameters, loss=True, grad=grad, mean=reduction == "mean")
    return torch.scalar_tensor(total, dtype=torch.float32), grad, None


registry.two_way(
    "distillation_loss", "cpu", _distillation_forward, _distillation_backward, _distillation_both,
    refuses=accepts(*DTYPES),
)  # fmt: skip


@registry.kernel("distillation_metrics", "cpu", refuses=accepts(*DTYPES))
def distillation_metrics(input: Tensor, target: Tensor, labels: Tensor | None, temperature: float) -> list[Tensor]:
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    kl, confidence, entropy, cross = (torch.empty(rows, dtype=torch.float32) for _ in range(4))
    agreement, student, teacher = (torch.empty(rows, dtype=torch.bool) for _ in range(3))
    if labels is None:
        cross = student = teacher = None
    _cpu.distillation_metrics(
        input.data_ptr(), target.data_ptr(), DTYPES[input.dtype], DTYPES[target.dtype], rows, classes,
        input.stride(0), target.stride(0), _address(labels), temperature, kl.data_ptr(), _address(cross),
        confidence.data_ptr(), entropy.data_ptr(), agreement.data_ptr(), _address(student), _address(teacher),
        torch.get_num_threads(),
    )  # fmt: skip
    return [value for value in (kl, agreement, confidence, entropy, cross, student, teacher) if value is not None]


@registry.kernel("group_norm_silu", "cpu", refuses=accepts(*DTYPES))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu) -> Tensor:
    batch, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    shape = (batch, channels + more, height, width)
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    if y.numel():
        affine = weight if bias is None else bias
        _cpu.group_norm_silu(
            x.data_ptr(), _address(skip), batch, height * width, channels, more, DTYPES[x.dtype],
            _address(weight), _address(bias), 0 if affine is None else DTYPES[affine.dtype],
            _address(shift), 0 if shift is None else DTYPES[shift.dtype], 0 if shift is None else shift.stride(0),
            groups, eps, silu, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return y


def _attention_refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
    if size not in (8, 16, 32, 64):
        return f"heads must have 8, 16, 32 or 64 channels, got {size}"
    return accepts(*DTYPES)(device, dtype, size)


WINOGRAD_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}  # of kr::Activation


WINOGRAD_TILES = getattr(_cpu, "winograd_tiles", 1)  # that the kernel takes together


def winograd_pack(weight: Tensor, scale: Tensor | None, transform: Tensor, packed: Tensor) -> bool:
    """Fill ``packed`` with the transformed filters ``scale * weight``; False where it is left to the reference."""
    if not hasattr(_cpu, "winograd_pack") or weight.device.type != "cpu":
        return False
    _cpu.winograd_pack(
        weight.data_ptr(), *weight.shape[:2], _address(scale), transform.data_ptr(), packed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return True


@registry.kernel("winograd_conv2d", "cpu", refuses=accepts(torch.float32))
def winograd_conv2d(x, weight, scale, bias, residual, activation, pool, y) -> None:
    batch, inputs, height, width = x.shape
    _cpu.winograd_conv2d(
        x.data_ptr(), batch, height, width, inputs, weight.data_ptr(), _address(scale), _address(bias),
        _address(residual), WINOGRAD_ACTIVATIONS[activation], pool, y.data_ptr(), y.shape[1], torch.get_num_threads(),
    )  # fmt: skip


@registry.kernel("qkv_attention", "cpu", refuses=_attention_refuses)
def qkv_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    out = torch.empty(batch, tokens, width // 3, dtype=qkv.dtype)
    _cpu.qkv_attention(
        qkv.data_ptr(), DTYPES[qkv.dtype], batch, tokens, heads, width // 3 // heads, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


@registry.kernel("membership_signals", "cpu", refuses=accepts(torch.float32, torch.bfloat16, torch.float16))
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = {name: torch.empty(len(logits), dtype=torch.float32) for name in want}
    _cpu.membership_signals(
        logits.data_ptr(), len(logits), logits.shape[1], logits.stride(0), labels.data_ptr(),
        *(_address(out.get(name)) for name in SIGNALS), torch.get_num_threads(),
    )  # fmt: skip
    return [out[name] for name in want]


@registry.kernel("lira", "cpu", refuses=accepts(torch.float32))
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    queries, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    scores = torch.empty(targets, examples, dtype=torch.float64)
    lacking = _cpu.lira(
        phi.data_ptr(), keep.data_ptr(), _address(target), queries, examples, models, targets, online,
        VARIANCES.index(variance),
        scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scores, lacking


@registry.kernel("roc", "cpu", refuses=accepts(torch.float64))
def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    thresholds = torch.empty_like(scores)
    tp, fp = torch.empty(len(scores), dtype=torch.int64), torch.empty(len(scores), dtype=torch.int64)
    points = _cpu.roc(
        scores.data_ptr(), members.data_ptr(), len(scores), thresholds.data_ptr(), tp.data_ptr(), fp.data_ptr()
    )
    return thresholds[:points], tp[:points], fp[:points]


@registry.kernel("bootstrap_auc", "cpu", refuses=accepts(torch.float64))
def bootstrap_auc(inside: Tensor, outside: Tensor, limits: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    auc = torch.empty(replicates, dtype=torch.float64)
    tp = torch.empty(replicates, len(limits), dtype=torch.int64)
    _cpu.bootstrap_auc(
        inside.data_ptr(), outside.data_ptr(), len(inside), limits.data_ptr(), len(limits), replicates, seed,
        auc.data_ptr(), tp.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return auc, tp


@registry.kernel("attack_r", "cpu", refuses=accepts(torch.float32, torch.float64))
def attack_r(phi: Tensor, keep: Tensor, target: Tensor | None) -> Tensor:
    queries, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    share = torch.empty(targets, examples, dtype=torch.float64)
    _cpu.attack_r(
        phi.data_ptr(), keep.data_ptr(), _address(target), phi.dtype == torch.float64, queries, examples, models,
        targets, share.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return share


@registry.kernel("best_threshold", "cpu", refuses=accepts(torch.float64))
def best_threshold(values: Tensor, held: Tensor, leave_out: bool) -> Tensor:
    examples, models = values.shape
    found = torch.empty(models if leave_out else 1, dtype=torch.float64)
    _cpu.best_threshold(
        values.data_ptr(), held.data_ptr(), examples, models, not leave_out, found.data_ptr(), torch.get_num_threads()
    )
    return found


@registry.kernel("rmia", "cpu", refuses=accepts(torch.float32, torch.float64))
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    count = torch.empty(p_x.shape[-1], dtype=torch.int64)
    _cpu.rmia(
        p_x.data_ptr(), p_z.data_ptr(), len(p_x) if p_x.ndim == 2 else 1, p_x.shape[-1], p_z.shape[-1],
        p_x.dtype == torch.float64, gamma, PREDICATES.index(predicate), count.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return count
