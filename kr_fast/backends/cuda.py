"""Kernels of ``kr_fast._cuda`` (CUDA C++). As :mod:`.cpu`, with the current CUDA stream as one more argument."""

import contextlib

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.membership_reference import PREDICATES, SIGNALS, VARIANCES

try:
    from kr_fast import _cuda
except ImportError as error:
    _cuda = None
    registry.mark_unavailable(
        "cuda", f"kr_fast._cuda cannot be loaded ({error}); install kr-fast where nvcc is found, see KR_FAST_CUDA"
    )


DEVICE = "cuda"  # the device type of the tensors that the module takes; tests load one that runs on the CPU
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbers of kr::Dtype


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def accepts(*dtypes: torch.dtype):
    """A predicate: tensors of one of ``dtypes`` on an NVIDIA GPU."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if torch.version.hip is not None:
            return "CUDA C++ kernels need an NVIDIA GPU, got ROCm"
        if device != DEVICE:
            return f"tensors must be on {DEVICE}, got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def queue(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as an address."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


@registry.kernel("philox_normal", "cuda", refuses=accepts(torch.float32))
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    with on(ids):
        _cuda.philox_normal(ids.data_ptr(), len(ids), numel, seed, stream, out.data_ptr(), queue(ids))
    return out


@registry.kernel("solver_step", "cuda", refuses=accepts(torch.float32))
def solver_step(
    sample, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies, out
) -> None:
    _solver_step(
        sample, sample.data_ptr(), model_output, uncond_output, ids, limits, [h.data_ptr() for h in history], row,
        guidance, seed, stream, copies, *out, (0,) * 6,
    )  # fmt: skip


@registry.kernel("solver_step_at", "cuda", refuses=accepts(torch.float32))
def solver_step_at(
    step, rows, slots, samples, kept, model_output, uncond_output, ids, limits, guidance, seed, stream, copies,
    input, image,
) -> None:  # fmt: skip
    table = (step.data_ptr(), len(rows), rows.data_ptr(), slots.data_ptr(), samples.data_ptr(), kept.data_ptr())
    _solver_step(
        samples[0], 0, model_output, uncond_output, ids, limits, [], [], guidance, seed, stream, copies,
        None, None, input, image, table,
    )  # fmt: skip


def _solver_step(
    like, x, model_output, uncond_output, ids, limits, history, row, guidance, seed, stream, copies,
    y, kept, input, image, table,
) -> None:  # fmt: skip
    """``like`` has the sample's shape and device, ``x`` is its address."""
    batch = len(like)
    channels = like.shape[1] if like.ndim == 4 else 1
    last = model_output.ndim == 4 and not model_output.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    model_output = model_output.contiguous(memory_format=layout)
    uncond_output = None if uncond_output is None else uncond_output.contiguous(memory_format=layout)
    with on(like):
        _cuda.solver_step(
            x, model_output.data_ptr(), _address(uncond_output), DTYPES[model_output.dtype], last,
            _address(ids), _address(limits), history, row, guidance, seed, stream,
            batch, channels, like.numel() // max(batch * channels, 1), _address(y), _address(kept),
            _address(input), 0 if input is None else DTYPES[input.dtype], copies, _address(image),
            *table, queue(like),
        )  # fmt: skip


@registry.kernel("pack_uint8", "cuda", refuses=accepts(*DTYPES))
def pack_uint8(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not last:
        x = x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    with on(x):
        _cuda.pack_uint8(x.data_ptr(), DTYPES[x.dtype], batch, channels, height * width, last, out.data_ptr(), queue(x))
    return out


@registry.kernel("group_norm_silu", "cuda", refuses=accepts(*DTYPES))
def group_norm_silu(x, skip, shift, weight, bias, groups, eps, silu) -> Tensor:
    batch, channels, height, width = x.shape
    more = 0 if skip is None else skip.shape[1]
    shape = (batch, channels + more, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    affine = weight if bias is None else bias
    with on(x):
        _cuda.group_norm_silu(
            x.data_ptr(), _address(skip), batch, height * width, channels, more, DTYPES[x.dtype],
            _address(weight), _address(bias), 0 if affine is None else DTYPES[affine.dtype],
            _address(shift), 0 if shift is None else DTYPES[shift.dtype], 0 if shift is None else shift.stride(0),
            groups, eps, silu, y.data_ptr(), queue(x),
        )  # fmt: skip
    return y


def _refuses_signals(device: str, dtype: torch.dtype, size: int) -> str | None:
    if size >= 2**28:
        return f"the class count must be below 2^28, got {size}"
    return accepts(*DTYPES)(device, dtype, size)


@registry.kernel("membership_signals", "cuda", refuses=_refuses_signals)
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = {name: torch.empty(len(logits), dtype=torch.float32, device=logits.device) for name in want}
    with on(logits):
        _cuda.membership_signals(
            logits.data_ptr(), DTYPES[logits.dtype], len(logits), logits.shape[1], logits.stride(0),
            labels.data_ptr(), *(_address(out.get(name)) for name in SIGNALS), queue(logits),
        )  # fmt: skip
    return [out[name] for name in want]


def _refuses_residual_block(device: str, dtype: torch.dtype, size: tuple[int, int, int] | int) -> str | None:
    why = accepts(torch.float16, torch.bfloat16)(device, dtype, 0)
    if why is None and size and not _cuda.residual_block_images(*size):
        channels, height, width = size
        why = (
            "channels must be 16, 32 or 64, and an image, beside the weights of both convolutions, fit a block of "
            f"threads of compute capability 8.0 or later, got {channels} channels of {height} x {width}"
        )
    return why


@registry.kernel("model_residual_block", "cuda", refuses=_refuses_residual_block)
def model_residual_block(x, weight1, bias1, weight2, bias2, scale, shift, relu) -> Tensor:
    models, images, height, width, channels = x.shape
    # Addresses of a GPU's own blocks of memory are multiples of 16, those of views need not be.
    x, weight1, weight2 = (each if each.data_ptr() % 16 == 0 else each.clone() for each in (x, weight1, weight2))
    y = torch.empty_like(x)
    with on(x):
        _cuda.model_residual_block(
            x.data_ptr(), weight1.data_ptr(), weight2.data_ptr(), _address(bias1), _address(bias2), _address(scale),
            _address(shift), x.dtype == torch.bfloat16, models, images, height, width, channels, relu, y.data_ptr(),
            queue(x),
        )  # fmt: skip
    return y


def _refuses_lira(device: str, dtype: torch.dtype, size: int) -> str | None:
    most = getattr(_cuda, "lira_models", 0)
    if size > most:
        return f"there must be at most {most} models, got {size}"
    return accepts(torch.float32)(device, dtype, size)


@registry.kernel("lira", "cuda", refuses=_refuses_lira)
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    queries, examples, models = phi.shape
    targets = models if target is None else target.shape[2]
    freedom = 8.0 + torch.arange(models + 1, dtype=torch.float64)  # kLiraPrior
    constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * freedom.log()
    constant, by_example = constant.to(phi.device), keep.T.contiguous()
    scores = torch.empty(targets, examples, dtype=torch.float64, device=phi.device)
    lacking = torch.zeros((), dtype=torch.int64, device=phi.device)
    with on(phi):
        pooled = None if variance == "per_example" else _lira_pooled(phi, keep, by_example, target, variance)
        for first in range(0, targets, _cuda.lira_models):  # more than one part for targets from outside only
            part = None if target is None else target[:, :, first : first + _cuda.lira_models].contiguous()
            rows = scores[first : first + _cuda.lira_models]
            _cuda.lira(
                phi.data_ptr(), by_example.data_ptr(), _address(part), queries, examples, models, len(rows),
                online, VARIANCES.index(variance), constant.data_ptr(), _address(pooled), rows.data_ptr(),
                lacking.data_ptr(), queue(phi),
            )  # fmt: skip
    return scores, int(lacking)


def _lira_pooled(phi: Tensor, keep: Tensor, by_example: Tensor, target: Tensor | None, variance: str) -> Tensor:
    """Variances over all examples ``[M, 2 sides]``, each target left out, or ``[1, 2]`` for targets from outside."""
    queries, examples, models = phi.shape
    targets, raw = 1 if target is not None else models, variance == "fixed_raw"
    blocks = min(examples, _cuda.lira_blocks)
    partial = torch.empty(blocks, targets, 2, 2, dtype=torch.float64, device=phi.device)
    _cuda.lira_pool(
        phi.data_ptr(), by_example.data_ptr(), _address(target), queries, examples, models, targets, raw,
        partial.data_ptr(), queue(phi),
    )  # fmt: skip
    first, second = partial.sum(0).unbind(2)
    held = keep.sum(1)
    counts = torch.stack([held.sum(), (examples - held).sum()])[None]
    if target is None:
        counts = counts - torch.stack([held, examples - held], 1)
    counts = (queries * counts).clamp_min(1)
    return (second / counts - (first / counts).square()).clamp_min(0) if raw else first / counts


@registry.kernel("rmia", "cuda", refuses=accepts(torch.float32, torch.float64))
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    x, z = (value.view(-1, value.shape[-1]) for value in (p_x, p_z))
    (queries, num_x), num_z = x.shape, z.shape[1]
    below = torch.empty(queries, num_x, dtype=torch.int32, device=x.device)
    with on(x):
        ordered = z.sort(1).values
        _cuda.rmia_below(
            x.data_ptr(), ordered.data_ptr(), queries, num_x, num_z, x.dtype == torch.float64, gamma,
            PREDICATES.index(predicate), below.data_ptr(), queue(x),
        )  # fmt: skip
        if queries == 1:
            return below[0].long()
        rank = torch.searchsorted(ordered, z, out_int32=True)
        count = torch.zeros(num_x, dtype=torch.int64, device=x.device)
        _cuda.rmia_vote(
            below.data_ptr(), rank.data_ptr(), queries, num_x, num_z, count.data_ptr(), queue(x),
        )  # fmt: skip
    return count


# Numbers of kr::DistillationLoss::target_kind; top-k rows become probabilities.
TARGET_KINDS = {"logits": 0, "probs": 1, "log_probs": 2, "topk_smooth": 1, "topk_renorm": 1}
DIVERGENCES = {"kl": 0, "cross": 1, "decoupled": 2}  # of kr::Divergence
STATS = 5  # floats of a row that backward gets, see kr_fast.ops._distillation
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device, stream: int) -> Tensor:
    """Sums of blocks, and a counter that every launch finds at 0 and leaves at 0.

    Launches of one stream follow each other, so they share one. A CUDA graph may run beside the stream that captured
    it: it gets one of its own, which its replays set to 0.
    """

    def fresh() -> Tensor:
        return torch.zeros(2 * _cuda.distillation_loss_blocks + 1, dtype=torch.float32, device=device)

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return fresh()
    key = device, stream
    if key not in _workspaces:
        _workspaces[key] = fresh()
    return _workspaces[key]


def _loss(
    input, target, indices, labels, weight,
    temperature, target_type, divergence, alpha, beta, soft, hard, smoothing, ignore_index, reduction,
    *, forward, row_loss=None, loss=None, scale, stats=None, grad=None, upstream=None, unless_one=False,
) -> None:  # fmt: skip
    """One launch, which writes ``loss`` or ``row_loss``, ``scale`` and ``stats``, or ``grad``, or all of them."""
    if target.dtype == torch.float64:
        target = target.float()
    rows, classes = input.shape
    with on(input):
        stream = queue(input)
        # Only a launch that adds rows up needs it.
        partial = _workspace(input.device, stream).data_ptr() if forward and row_loss is None else 0
        _cuda.distillation_loss(
            forward, _address(row_loss), _address(loss), _address(scale), _address(stats), _address(grad),
            partial, partial + 8 * _cuda.distillation_loss_blocks, _address(upstream),
            upstream.stride(0) if upstream is not None and upstream.ndim else 0, unless_one, reduction == "mean",
            input.data_ptr(), target.data_ptr(), DTYPES[input.dtype], DTYPES[target.dtype], rows, classes,
            input.stride(0), target.stride(0), _address(labels), _address(weight),
            temperature, soft, hard, smoothing, ignore_index, TARGET_KINDS[target_type], _address(indices),
            target.shape[1], target_type == "topk_smooth", DIVERGENCES[divergence], alpha, beta, stream,
        )  # fmt: skip


def _loss_forward(input, target, indices, labels, weight, *parameters):
    """(loss, row statistics, factor of the gradients), float32, in one launch."""
    loss, row_loss = None, None
    if parameters[-1] == "none":
        out = row_loss = torch.empty(len(input), dtype=torch.float32, device=input.device)
    else:
        out = loss = torch.empty((), dtype=torch.float32, device=input.device)
    stats, scale = out.new_empty(len(input), STATS), out.new_empty(())
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=True, row_loss=row_loss, loss=loss, scale=scale, stats=stats,
    )  # fmt: skip
    return out, stats, scale


def _loss_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters) -> Tensor:
    """d loss / d input, of input's dtype, contiguous."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=False, scale=scale, stats=stats, grad=grad, upstream=upstream.float(),
    )  # fmt: skip
    return grad


def _loss_both(input, target, indices, labels, weight, *parameters) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, factor): the logits are read once."""
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    loss = torch.empty((), dtype=torch.float32, device=input.device)
    scale = torch.empty_like(loss)
    _loss(input, target, indices, labels, weight, *parameters, forward=True, loss=loss, scale=scale, grad=grad)
    return loss, grad, scale


def _loss_amend(grad, upstream, input, target, indices, labels, weight, scale, *parameters) -> None:
    """The gradient once more into ``grad``, unless the device finds that the upstream gradient is 1."""
    _loss(
        input, target, indices, labels, weight, *parameters,
        forward=False, scale=scale, grad=grad, upstream=upstream.float(), unless_one=True,
    )  # fmt: skip


def _refuses_loss(device: str, dtype: torch.dtype, size: int) -> str | None:
    if size >= 2**28:
        return f"the class count must be below 2^28, got {size}"
    return accepts(*DTYPES)(device, dtype, size)


registry.two_way(
    "distillation_loss", "cuda", _loss_forward, _loss_backward, _loss_both, _loss_amend, refuses=_refuses_loss
)
