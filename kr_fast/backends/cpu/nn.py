"""Kernels of the family ``nn`` in ``kr_fast._cpu``."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kr_fast.backends import codes, conv_structs, native, registry, structs
from kr_fast.backends.arguments import (
    BatchNormAct,
    BatchNormActGradient,
    BlockLayers,
    BlockState,
    DirectConv,
    DirectConvGradient,
    GroupNorm,
    GroupNormGradient,
    OptimizerStep,
    PreactivationBlock,
    WinogradConv,
    WinogradGradWeight,
)
from kr_fast.backends.calls import AttentionCall, Call


def _group_norm(call: GroupNorm, y: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    if mean is None:
        native.cpu.group_norm_silu(structs.group_norm(call, y), torch.get_num_threads())
    else:
        kept = {"mean": mean.data_ptr(), "rstd": rstd.data_ptr()}
        native.cpu.group_norm_silu_forward(structs.group_norm(call, y), kept, torch.get_num_threads())


def _group_norm_backward(call: GroupNormGradient) -> tuple[Tensor | None, ...]:
    return _group_norm_gradients(call, None)


def group_norm_sample_gradients(call: GroupNormGradient) -> tuple[Tensor | None, ...]:
    """Of x, skip and shift as ``group_norm_silu_backward``, and those of weight and bias, ``[N, 2, C]``, by sample."""
    samples = native.empty(len(call.grad), 2, call.grad.shape[1])
    return *_group_norm_gradients(call, samples)[:3], samples


def group_norm_relu(call: GroupNorm, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(norm + residual)``, mean and 1 / deviation; of a call in float32 without skip and SiLU."""
    y, mean = torch.empty_like(call.x), native.empty(len(call.x), call.groups)
    rstd = torch.empty_like(mean)
    relu, kept = {"residual": native.address(residual)}, {"mean": mean.data_ptr(), "rstd": rstd.data_ptr()}
    native.cpu.group_norm_relu(structs.group_norm(call, y), relu, kept, torch.get_num_threads())
    return y, mean, rstd


def group_norm_relu_sample_gradients(
    call: GroupNormGradient, y: Tensor, passes: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of x, of the residual if asked for, and of weight and bias by sample; ``y`` is :func:`group_norm_relu`'s."""
    samples, passed = native.empty(len(y), 2, y.shape[1]), torch.empty_like(y) if passes else None
    out = _group_norm_gradients(call, samples, y, passed)[0]
    return out, passed, samples


def _group_norm_gradients(
    call: GroupNormGradient, samples: Tensor | None, made: Tensor | None = None, passed: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    batch, channels = call.grad.shape[:2]
    out, skip_out = torch.empty_like(call.x), None if call.skip is None else torch.empty_like(call.skip)
    grad_shift = None if call.shift is None else native.empty(batch, channels)
    grad_affine = [native.empty(channels), native.empty(channels)]
    fields = structs.group_norm_gradient(call, out, skip_out, grad_shift, grad_affine, samples, made, passed)
    native.cpu.group_norm_silu_backward(*fields, torch.get_num_threads())
    return out, skip_out, grad_shift, *grad_affine


registry.differentiable(
    "group_norm_silu",
    "cpu",
    registry.Differentiable(_group_norm, _group_norm_backward),
    refuses=native.cpu_tensors(*codes.DTYPES),
)


def _batch_norm(call: BatchNormAct) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(call.x, memory_format=torch.channels_last)
    mean, var = native.empty(call.x.shape[1]), native.empty(call.x.shape[1])
    native.cpu.batch_norm_act(structs.batch_norm_act(call, y, mean, var), torch.get_num_threads())
    return y, mean, var


def _batch_norm_backward(call: BatchNormActGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(call.x, memory_format=torch.channels_last)
    passed = torch.empty_like(out) if call.passes else None
    grad_weight, grad_bias = torch.empty_like(call.mean), torch.empty_like(call.mean)
    fields = structs.batch_norm_act_backward(call, out, passed, grad_weight, grad_bias)
    native.cpu.batch_norm_act_backward(fields, torch.get_num_threads())
    return out, grad_weight, grad_bias, call.x.new_empty(0) if passed is None else passed


registry.differentiable(
    "batch_norm_act",
    "cpu",
    registry.Differentiable(_batch_norm, _batch_norm_backward),
    refuses=native.cpu_tensors(*codes.DTYPES),
)


def _with_even_taps(weight: Tensor) -> Tensor:
    """``weight``, copied where its taps do not lie equally far apart."""
    _, _, height, width = weight.shape
    even = height == 1 or width == 1 or weight.stride(2) == width * weight.stride(3)
    return weight if even else weight.contiguous()


def _direct_conv2d(call: DirectConv, y: Tensor) -> None:
    weight = _with_even_taps(call.weight)  # alive until the kernel has read it
    native.cpu.direct_conv2d(conv_structs.direct_conv(call, weight, y), torch.get_num_threads())


def _direct_conv2d_backward(call: DirectConvGradient) -> tuple[Tensor | None, ...]:
    weight = _with_even_taps(call.weight)
    grad_x = torch.empty_like(call.x) if call.by_x else None
    grad_weight = torch.empty_like(weight) if call.by_weight else None
    grad_bias = native.empty(len(weight)) if call.by_bias else None
    fields = conv_structs.direct_conv_gradient(call, weight, grad_x, grad_weight, grad_bias)
    native.cpu.direct_conv2d_backward(fields, torch.get_num_threads())
    return grad_x, grad_weight, grad_bias


registry.differentiable(
    "direct_conv2d",
    "cpu",
    registry.Differentiable(_direct_conv2d, _direct_conv2d_backward),
    refuses=native.cpu_tensors(torch.float32),
)


def _by_winograd(x: Tensor, layers: BlockLayers, shape: torch.Size) -> list[bool]:
    outputs = shape[1]
    second = winograd_trains_faster(shape, outputs)
    first = second if x.shape == shape else layers.stride == 1 and winograd_trains_faster(x.shape, outputs)
    return [first, second, False]


def _residual_block(x: Tensor, layers: BlockLayers, transform: Tensor, y: Tensor, state: BlockState | None) -> None:
    fields = conv_structs.residual_block(x, layers, state, _by_winograd(x, layers, y.shape), transform, y)
    run = native.cpu.residual_block_inference if state is None else native.cpu.residual_block
    run(fields, torch.get_num_threads())


def _residual_block_backward(
    grad: Tensor, x: Tensor, layers: BlockLayers, transform: Tensor, state: BlockState, needs_x: bool
) -> tuple[Tensor | None, list[Tensor], Tensor]:
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weights, grad_norm = [torch.empty_like(each) for each in layers.weights], torch.empty_like(state.statistics)
    winograd = _by_winograd(x, layers, grad.shape)
    native.cpu.residual_block_backward(
        conv_structs.residual_block(x, layers, state, winograd, transform, None),
        conv_structs.residual_block_gradient(grad, grad_x, grad_weights, grad_norm),
        torch.get_num_threads(),
    )
    return grad_x, grad_weights, grad_norm


registry.differentiable(
    "residual_block",
    "cpu",
    registry.Differentiable(_residual_block, _residual_block_backward),
    refuses=native.cpu_tensors(torch.float32),
)


def _preactivation_block(call: PreactivationBlock, transform: Tensor, y: Tensor, state: Sequence[Tensor]) -> None:
    native.cpu.preactivation_block(conv_structs.preactivation_block(call, state, transform, y), torch.get_num_threads())


def _preactivation_block_backward(
    call: PreactivationBlock, transform: Tensor, grad: Tensor, state: Sequence[Tensor]
) -> list[Tensor | None]:
    out = [None if each is None else torch.empty_like(each) for each in call[:13]]
    batch, outputs = grad.shape[:2]
    out[2] = native.empty(batch, outputs)  # whether it is asked for or not: the first bias is its sum
    for index in (6, 10, *(() if call.shortcut_weight is None else (12,))):
        out[index] = native.empty(outputs)
    fields = conv_structs.preactivation_block_gradient(grad, out)
    block = conv_structs.preactivation_block(call, state, transform, None)
    native.cpu.preactivation_block_backward(block, fields, torch.get_num_threads())
    return [None if each is None else grad for each, grad in zip(call[:13], out, strict=True)]


registry.differentiable(
    "preactivation_block",
    "cpu",
    registry.Differentiable(_preactivation_block, _preactivation_block_backward),
    refuses=native.cpu_tensors(torch.float32),
)


def _refuses_attention(call: AttentionCall) -> str | None:
    if call.head_channels not in (8, 16, 32, 64, None):
        return f"heads must have 8, 16, 32 or 64 channels, got {call.head_channels}"
    return native.cpu_tensors(*codes.DTYPES)(call)


@registry.kernel("winograd_pack", "cpu", refuses=native.cpu_tensors(torch.float32))
def winograd_pack(weight: Tensor, scale: Tensor | None, turned: bool, transform: Tensor, packed: Tensor) -> None:
    weight = weight if weight.stride(2) == 3 * weight.stride(3) else weight.contiguous()
    native.cpu.winograd_pack(
        conv_structs.winograd_pack(weight, scale, turned, transform, packed), torch.get_num_threads()
    )


@registry.kernel("winograd_conv2d", "cpu", refuses=native.cpu_tensors(torch.float32))
def winograd_conv2d(call: WinogradConv, y: Tensor) -> None:
    native.cpu.winograd_conv2d(conv_structs.winograd_conv(call, y), torch.get_num_threads())


@registry.kernel("winograd_conv2d_grad_weight", "cpu", refuses=native.cpu_tensors(torch.float32))
def winograd_conv2d_grad_weight(call: WinogradGradWeight) -> None:
    native.cpu.winograd_conv2d_grad_weight(conv_structs.winograd_grad_weight(call), torch.get_num_threads())


def _attention_forward(qkv: Tensor, heads: int, *, logsumexp: bool) -> tuple[Tensor, Tensor | None]:
    batch, tokens, width = qkv.shape
    out = native.empty(batch, tokens, width // 3, dtype=qkv.dtype)
    sums = native.empty(batch, heads, tokens) if logsumexp else None
    native.cpu.qkv_attention(structs.qkv_attention(qkv, heads, out, sums), torch.get_num_threads())
    return out, sums


def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, heads: int) -> Tensor:
    grad_qkv = native.empty(*qkv.shape, dtype=qkv.dtype)
    call = structs.qkv_attention_backward(grad_out, qkv, heads, out, logsumexp, grad_qkv)
    native.cpu.qkv_attention_backward(call, torch.get_num_threads())
    return grad_qkv


registry.differentiable(
    "qkv_attention",
    "cpu",
    registry.Differentiable(_attention_forward, _attention_backward),
    refuses=_refuses_attention,
)


@registry.kernel("optimizer_step", "cpu", refuses=native.cpu_tensors(torch.float32))
def optimizer_step(call: OptimizerStep) -> float:
    fields, alive = structs.optimizer_step(call)
    norm = native.cpu.optimizer_step(fields, torch.get_num_threads())
    del alive  # the arrays that the kernel has read
    torch.autograd.graph.increment_version(call.tensors.parameters)
    return norm


WINOGRAD_TILES = getattr(native.cpu, "winograd_tiles", 1)  # that the kernel takes together
# With fewer inputs the transforms of pixels cost more than the products that they save.
FEWEST_INPUTS = 12
# Of the 16 pixels of a tile. Sums by the definition, 9 a pixel, cost as much as the 36 of a tile with all that is
# around them where 7 pixels are real: 2x2 and 5x5 pixels took the same time, 3x3 and 6x6 (9 a tile) 1.1 to 1.9 times
# as long by the library, 4x4, 7x7 and 8x8 twice (64 to 512 channels, AVX-512).
FEWEST_PIXELS = 8


def winograd_is_faster(
    conv: nn.Conv2d, stride: tuple[int, ...], padding: tuple[int, ...] | str, size: tuple[int, int] = (4, 4)
) -> bool:
    """Whether float32 on this CPU is faster for ``conv`` than the library's kernels, on images of ``size``.

    Plain C++ would lose to them, and so do images that leave most of their tiles empty.
    """
    form = (conv.kernel_size, stride, padding, conv.padding_mode, conv.dilation, conv.groups)
    fits = form == ((3, 3), (1, 1), (1, 1), "zeros", (1, 1), 1) and conv.in_channels >= FEWEST_INPUTS
    tiles = -(-size[0] // 4) * -(-size[1] // 4)
    if not fits or native.isa() in (None, "scalar"):
        return False
    runs = registry.runs_preferred("winograd_conv2d", Call("cpu", torch.float32))
    return runs and size[0] * size[1] >= FEWEST_PIXELS * tiles


def winograd_trains_faster(shape: tuple[int, int, int, int], outputs: int) -> bool:
    """Whether a forward and backward pass of winograd_conv2d for ``x`` of ``shape`` is faster than the library's.

    Both sides of the convolution are once the inputs. What a step does whatever the number of tiles, to pack the
    filters twice and to transform their gradient, costs as much as some 13 tiles each, and more where 36 numbers of
    every filter leave the cache: with 16 tiles 64 channels took 0.98 to 1.4 times as long by the library, 256 channels
    0.3 to 0.7 times, and with 64 tiles 1.4 times (AVX-512, one thread).
    """
    batch, inputs, height, width = shape
    tiles = -(-height // 4) * -(-width // 4)
    fits = min(inputs, outputs) >= FEWEST_INPUTS and height * width >= FEWEST_PIXELS * tiles
    if not fits or batch * tiles < max(16, inputs // 4, outputs // 4) or native.isa() in (None, "scalar"):
        return False
    return registry.runs_preferred("winograd_conv2d", Call("cpu", torch.float32))


# Sides of the kernels that were measured; images that keep some threads busy; inputs by outputs of a 1x1 convolution,
# which is one product of matrices: as fast by the library, and faster on two threads where it was a million.
LARGEST_KERNEL, FEWEST_IMAGES, LARGEST_PRODUCT = 3, 8, 2**19


def direct_trains_faster(conv: nn.Conv2d, shape: tuple[int, ...]) -> bool:
    """Whether a forward and backward pass of direct_conv2d for ``conv`` on ``x`` of ``shape`` is faster than the
    library's, or as fast and with bits that do not depend on the number of threads.

    Where channels fill vectors both run near the processor's peak, and what is gained is what the library spends
    around that: 1.5 to 2.6 times as long at 8 px and below, 1.2 to 1.9 for strided kernels, 1.3 to 5 with one input or
    output, 1.0 to 1.1 with three inputs and for 1x1 kernels of stride 1 (AVX-512, one and two threads). 3x3 kernels of
    stride 1 are faster still where winograd_trains_faster says so.
    """
    form = (conv.padding_mode, conv.dilation, conv.groups, isinstance(conv.padding, str))
    if form != ("zeros", (1, 1), 1, False) or max(conv.kernel_size) > LARGEST_KERNEL or shape[0] < FEWEST_IMAGES:
        return False
    large = conv.kernel_size == (1, 1) and conv.in_channels * conv.out_channels > LARGEST_PRODUCT
    return not large and direct_trains()


def direct_trains() -> bool:
    """Whether direct_conv2d runs here, and by vectors."""
    runs = native.isa() not in (None, "scalar")
    return runs and registry.runs_preferred("direct_conv2d", Call("cpu", torch.float32))


def winograd_batch_size(count: int, images: int) -> int:
    """Near ``count``, so that ``images`` images in batches of it, the last filled up, take the least time.

    A number whose tiles fill the kernel's blocks whatever the image's size, for a last block of a few tiles reads all
    weights as a full one does; unless the last batch would waste more than the 4 % that it saves. Half a block is
    enough for images of an even number of tiles.
    """
    block = WINOGRAD_TILES
    whole = block * round(count / block) or (block // 2 if 3 * count > block else count)

    def filled(size: int) -> int:
        return -(-images // size) * size

    return whole if filled(whole) <= 1.04 * filled(count) else count
