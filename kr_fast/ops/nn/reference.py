"""Normalisation, attention and Winograd convolution in plain torch: the definitions."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.backends.arguments import (
    AdamWRule,
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
    SGDRule,
    WinogradConv,
    WinogradGradWeight,
)
from kr_fast.backends.registry import Differentiable, differentiable, kernel, never


def _group_norm(call: GroupNorm, out: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    """Group norm of ``[x, skip] + shift``, in float32 at least, and SiLU."""
    u = _grouped(call.x, call.skip, call.shift, call.groups)
    variance, centre = torch.var_mean(u, (2, 3, 4), correction=0, keepdim=True)
    inverse = (variance + call.eps).rsqrt()
    if mean is not None:
        mean.copy_(centre[:, :, 0, 0, 0]), rstd.copy_(inverse[:, :, 0, 0, 0])
    y = _affine(((u - centre) * inverse).view(out.shape), call.weight, call.bias)
    out.copy_(F.silu(y) if call.silu else y)


def _grouped(x: Tensor, skip: Tensor | None, shift: Tensor | None, groups: int) -> Tensor:
    """``[x, skip] + shift`` as ``[N, groups, channels of a group, H, W]``, in float32 at least."""
    u = (x if skip is None else torch.cat([x, skip], 1)).to(torch.promote_types(x.dtype, torch.float32))
    u = u if shift is None else u + shift[:, :, None, None]
    return u.reshape(len(u), groups, u.shape[1] // groups, *u.shape[2:])


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def _group_norm_backward(call: GroupNormGradient) -> tuple[Tensor | None, ...]:
    """``rstd (w dz - mean_g(w dz) - n mean_g(w dz n))`` with ``n = (u - mean) rstd``, ``dz = g act'(w n + b)``."""
    rstd = call.rstd[:, :, None, None, None]
    n = ((_grouped(*call[1:4], call.groups) - call.mean[:, :, None, None, None]) * rstd).view(call.grad.shape)
    dz = call.grad.to(n.dtype)
    if call.silu:
        z = _affine(n, call.weight, call.bias)
        dz = dz * z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    grad_affine = (dz * n).sum((0, 2, 3)), dz.sum((0, 2, 3))
    wdz, n = (each.unflatten(1, (call.groups, -1)) for each in (_affine(dz, call.weight, None), n))
    one, two = (each.mean((2, 3, 4), keepdim=True) for each in (wdz, wdz * n))
    du = (rstd * (wdz - one - n * two)).view(call.grad.shape)
    cut, grad_shift = call.x.shape[1], None if call.shift is None else du.sum((2, 3))
    skip_out = None if call.skip is None else _as(call.skip, du[:, cut:])
    return _as(call.x, du[:, :cut]), skip_out, grad_shift, *grad_affine


differentiable("group_norm_silu", "reference", Differentiable(_group_norm, _group_norm_backward), refuses=never)


def _preactivation(call: PreactivationBlock) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block layer by layer: the result, and what the convolutions read and the first of them makes."""
    u = call.x if call.skip is None else torch.cat([call.x, call.skip], 1)
    first = F.silu(F.group_norm(u, call.groups[0], call.norm1_weight, call.norm1_bias, call.eps[0]))
    convolved = F.conv2d(first, call.conv1_weight, call.conv1_bias, padding=1)
    shifted = convolved if call.shift is None else convolved + call.shift[:, :, None, None]
    second = F.silu(F.group_norm(shifted, call.groups[1], call.norm2_weight, call.norm2_bias, call.eps[1]))
    shortcut = u if call.shortcut_weight is None else F.conv2d(u, call.shortcut_weight, call.shortcut_bias)
    return F.conv2d(second, call.conv2_weight, call.conv2_bias, padding=1) + shortcut, first, second, convolved


def _preactivation_block(call: PreactivationBlock, transform: Tensor, y: Tensor, state: Sequence[Tensor]) -> None:
    """The statistics are left as they are: the gradient here does not read them."""
    for to, each in zip((y, *state[:3]), _preactivation(call), strict=True):
        to.copy_(each)
    state[3].zero_()


def _preactivation_block_backward(
    call: PreactivationBlock, transform: Tensor, grad: Tensor, state: Sequence[Tensor]
) -> list[Tensor | None]:
    """By autograd through the layers."""
    with torch.enable_grad():
        tensors = [None if each is None else each.detach().clone().requires_grad_() for each in call[:13]]
        y = _preactivation(PreactivationBlock(*tensors, *call[13:]))[0]
    grads = iter(torch.autograd.grad(y, [each for each in tensors if each is not None], grad))
    return [None if each is None else torch.empty_like(each).copy_(next(grads)) for each in call[:13]]


differentiable(
    "preactivation_block",
    "reference",
    Differentiable(_preactivation_block, _preactivation_block_backward),
    refuses=never,
)


def _heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """``[N, T, parts * heads * d]`` as ``[parts, N, heads, T, d]``, in float32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return exact.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _attention_forward(qkv: Tensor, heads: int, *, logsumexp: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each head, in float32 at least, and the logsumexp ``[N, heads, T]`` of each row of scores
    if that is asked for."""
    q, k, v = _heads(qkv, 3, heads)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    out = (scores.softmax(3) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)
    return out, scores.logsumexp(3) if logsumexp else None


def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, heads: int) -> Tensor:
    """Dao, "FlashAttention-2", 2023, section 2.1 and algorithm 2."""
    q, k, v = _heads(qkv, 3, heads)
    (o,), (do,) = _heads(out, 1, heads), _heads(grad_out, 1, heads)
    scale = 1 / math.sqrt(q.shape[3])
    p = (q @ k.transpose(2, 3) * scale - logsumexp[..., None]).exp()
    ds = p * (do @ v.transpose(2, 3) - (do * o).sum(3, keepdim=True))
    grads = torch.stack([ds @ k * scale, ds.transpose(2, 3) @ q * scale, p.transpose(2, 3) @ do])
    return grads.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)


differentiable("qkv_attention", "reference", Differentiable(_attention_forward, _attention_backward), refuses=never)


def _batch_norm(call: BatchNormAct) -> tuple[Tensor, Tensor, Tensor]:
    """By the statistics of the batch, in float32 at least."""
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = _affine(_normalized(x, mean, var, call.eps), call.weight, call.bias)
    if call.residual is not None:
        y = y + call.residual
    return _as(call.x, y.relu() if call.relu else y), mean, var


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - mean[:, None, None]) * (var + eps).rsqrt()[:, None, None]


def _as(x: Tensor, y: Tensor) -> Tensor:
    return y.to(x).contiguous(memory_format=torch.channels_last)


def _batch_norm_backward(call: BatchNormActGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``w r (g - mean(g) - n mean(g n))`` with ``n = (x - mean) r``, ``r = 1 / sqrt(var + eps)``."""
    x, g = (each.to(call.mean.dtype) for each in (call.x, call.grad))
    n, inverse = _normalized(x, call.mean, call.var, call.eps), (call.var + call.eps).rsqrt()
    if call.relu:
        y = _affine(n, call.weight, call.bias) if call.y is None else call.y
        g = torch.where(y <= 0, 0, g)
    passed = _as(call.x, g) if call.passes else call.x.new_empty(0)
    rows = x.numel() // len(call.mean)
    grad_weight, grad_bias = (g * n).sum((0, 2, 3)), g.sum((0, 2, 3))
    out = g - grad_bias[:, None, None] / rows - n * (grad_weight[:, None, None] / rows)
    out = out * (inverse if call.weight is None else inverse * call.weight)[:, None, None]
    return _as(call.x, out), grad_weight, grad_bias, passed


differentiable("batch_norm_act", "reference", Differentiable(_batch_norm, _batch_norm_backward), refuses=never)


def _direct_conv2d(call: DirectConv, y: Tensor) -> None:
    y.copy_(F.conv2d(call.x.contiguous(), *call[1:]))


def _direct_conv2d_backward(call: DirectConvGradient) -> tuple[Tensor | None, ...]:
    """In NCHW: with few channels oneDNN's weight gradient of a strided 1x1 convolution is wrong in channels_last."""
    g, x, weight = (each.contiguous() for each in call[:3])
    grad_x = torch.nn.grad.conv2d_input(x.shape, weight, g, *call[3:5]) if call.by_x else None
    grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, g, *call[3:5]) if call.by_weight else None
    grads = (None if grad_x is None else _as(call.x, grad_x)), grad_weight
    return *grads, g.sum((0, 2, 3)) if call.by_bias else None


differentiable("direct_conv2d", "reference", Differentiable(_direct_conv2d, _direct_conv2d_backward), refuses=never)


def _block(
    x: Tensor, layers: BlockLayers, given: bool = False
) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The block layer by layer: the result, what stands before the norms, and variance and mean of each, which are the
    running ones if ``given``."""

    def layer(index: int, x: Tensor, stride: int) -> Tensor:
        weight = layers.weights[index]
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        convolved.append(y)
        if given:
            mean, var = layers.running[2 * index : 2 * index + 2]
        else:
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            moments.append((var, mean))
        return _affine(_normalized(y, mean, var, layers.eps[index]), *layers.norms[2 * index : 2 * index + 2])

    convolved, moments = [], []
    y = layer(1, layer(0, x, layers.stride).relu(), 1)
    return (y + (layer(2, x, layers.stride) if len(layers.weights) == 3 else x)).relu(), convolved, moments


def _residual_block(x: Tensor, layers: BlockLayers, transform: Tensor, y: Tensor, state: BlockState | None) -> None:
    result, convolved, moments = _block(x, layers, given=state is None)
    y.copy_(result)
    if state is None:
        return
    for index, (var, mean) in enumerate(moments):
        state.convolved[index].copy_(convolved[index].permute(0, 2, 3, 1))
        torch.stack([mean, var], out=state.statistics[index])
        if layers.running and layers.running[2 * index] is not None:
            update_running(*layers.running[2 * index : 2 * index + 2], mean, var, layers.momentum[index], y)
    bits = (y.permute(0, 2, 3, 1) > 0).unflatten(3, (-1, 8)) << torch.arange(8, device=y.device)
    state.positive.copy_(bits.sum(4))


def update_running(mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, momentum: float, y: Tensor) -> None:
    """As BatchNorm does from a batch whose norm has the shape of ``y``."""
    rows = y.numel() // len(mean)
    mean.lerp_(new_mean, momentum)
    var.mul_(1 - momentum).add_(new_var, alpha=momentum * rows / (rows - 1))


def _residual_block_backward(
    grad: Tensor, x: Tensor, layers: BlockLayers, transform: Tensor, state: BlockState, needs_x: bool
) -> tuple[Tensor | None, list[Tensor], Tensor]:
    """By autograd through the layers."""
    moments = state.statistics
    one, zero = torch.ones_like(moments[0, 0]), torch.zeros_like(moments[0, 0])
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        weights = [each.detach().requires_grad_() for each in layers.weights]
        defaults = [one, zero] * len(weights)
        norms = [
            (default if each is None else each).detach().clone().requires_grad_()
            for each, default in zip(layers.norms, defaults, strict=True)
        ]
        y = _block(x, layers._replace(weights=weights, norms=norms))[0]
        grad_x, *grads = torch.autograd.grad(y, [x, *weights, *norms], grad)
    count = len(weights)
    grad_weights = [torch.empty_like(each).copy_(g) for each, g in zip(layers.weights, grads[:count], strict=True)]
    return _as(x, grad_x) if needs_x else None, grad_weights, torch.stack(grads[count:]).view_as(moments)


differentiable("residual_block", "reference", Differentiable(_residual_block, _residual_block_backward), refuses=never)


INPUTS = 16  # inputs of a packed weight are rounded up to a multiple of it
# The points of the interpolation, but for infinity: with them the error is about a third of that of 0, +-1, +-2.
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)


@functools.cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """float64 ``B^T [6, 6], G [6, 3], A^T [4, 6]``: ``A^T [(G g G^T) . (B^T d B)] A`` are 4x4 pixels of the
    correlation of the 6x6 pixels d with the 3x3 filter g (Lavin and Gray, 2016, eq. 8)."""
    with torch.device("cpu"):  # whatever torch's default is
        into, weights = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)
        back = torch.zeros(4, 6, dtype=torch.float64)
        for i, point in enumerate(POINTS):
            others = [other for other in POINTS if other != point]
            into[i, :5] = _polynomial(others)
            scale = 1.0
            for other in others:
                scale *= point - other
            weights[i] = torch.tensor([point**k / scale for k in range(3)], dtype=torch.float64)
            back[:, i] = torch.tensor([point**k for k in range(4)], dtype=torch.float64)
        into[5], weights[5, 2], back[3, 5] = _polynomial(POINTS), 1.0, 1.0  # infinity
    return into, weights, back


def _polynomial(roots: tuple[float, ...] | list[float]) -> Tensor:
    """Coefficients of ``prod (x - root)``, the constant one first."""
    result = torch.ones(1, dtype=torch.float64)
    for root in roots:
        result = torch.cat([result.new_zeros(1), result]) - root * torch.cat([result, result.new_zeros(1)])
    return result


def block_of(outputs: int) -> int:
    """Outputs that lie side by side in a packed weight."""
    return 16 if outputs <= 16 else 32


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """Of a packed weight: places, blocks of outputs, inputs, outputs of a block."""
    block = block_of(outputs)
    return 36, -(-outputs // block), -(-inputs // INPUTS) * INPUTS, block


@kernel("winograd_pack", "reference", refuses=never)
def winograd_pack(weight: Tensor, scale: Tensor | None, turned: bool, transform: Tensor, packed: Tensor) -> None:
    """``U = G (scale g) G^T`` of ``[O, I, 3, 3]`` in float64, as ``[36, blocks of outputs, inputs, outputs of a
    block]``."""
    weight = weight.flip(2, 3).transpose(0, 1) if turned else weight
    outputs, inputs = weight.shape[:2]
    block, g = block_of(outputs), transform.to(weight.device)
    weight = weight.double() if scale is None else weight.double() * scale[:, None, None, None]
    taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
    moved = (torch.kron(g, g) @ taps).to(packed.dtype).view(36, inputs, outputs)
    padded = F.pad(moved, (0, -outputs % block, 0, -inputs % INPUTS))
    packed.copy_(padded.unflatten(2, (-1, block)).transpose(1, 2))


# In the order of kr::Activation.
_ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


@kernel("winograd_conv2d", "reference", refuses=never)
def winograd_conv2d(call: WinogradConv, y: Tensor) -> None:
    """Tiles of 6x6 pixels, 4 apart: ``A^T [sum_inputs U . (B^T d B)] A``."""
    x = call.x
    into, _, back = (each.to(x) for each in transforms())
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1 + -width % 4, 1, 1 + -height % 4))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [N, I, down, across, 6, 6]
    v = (into @ tiles @ into.T).flatten(4)
    u = call.weight.transpose(1, 2).flatten(2)[:, : x.shape[1], : call.outputs]
    m = torch.einsum("nctup,pco->notup", v, u).unflatten(4, (6, 6))
    result = (back @ m @ back.T).permute(0, 1, 2, 4, 3, 5).flatten(2, 3).flatten(3)[:, :, :height, :width]
    result = F.max_pool2d(result, 2) if call.pool else result
    if call.scale is not None:
        result = result * call.scale[:, None, None]
    if call.bias is not None:
        result = result + call.bias[:, None, None]
    if call.residual is not None:
        result = result + call.residual
    y.copy_(_ACTIVATIONS[call.activation](result))


@kernel("winograd_conv2d_grad_weight", "reference", refuses=never)
def winograd_conv2d_grad_weight(call: WinogradGradWeight) -> None:
    """``dw[o, c, k, l] = sum_{n, i, j} x[n, c, i + k - 1, j + l - 1] dy[n, o, i, j]``, and the sum of ``dy``."""
    x, grad_output = call.x, call.grad_output
    call.grad_weight.copy_(torch.nn.grad.conv2d_weight(x, call.grad_weight.shape, grad_output, padding=1))
    if call.grad_bias is not None:
        torch.sum(grad_output, (0, 2, 3), out=call.grad_bias)


@kernel("optimizer_step", "reference", refuses=never)
def optimizer_step(call: OptimizerStep) -> float:
    """Tensor after tensor, in the order of torch's own step."""
    tensors = call.tensors
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in call.grads if g is not None))
    if not math.isfinite(norm):
        return norm
    clip = min(1.0, call.max_norm / (norm + 1e-6))
    for i, (p, g) in enumerate(zip(tensors.parameters, call.grads, strict=True)):
        rule, mean = call.rules[tensors.groups[i]], tensors.averages[i]
        if g is not None and isinstance(rule, SGDRule):
            _sgd(p, g * clip, tensors.first[i], rule)
        elif g is not None:
            _adamw(p, g * clip, tensors.first[i], tensors.second[i], tensors.steps[i].add_(1), rule)
        if mean is not None:
            mean.lerp_(p, call.average_weight)
    return norm


def _sgd(p: Tensor, g: Tensor, momentum_buffer: Tensor | None, rule: SGDRule) -> None:
    g = g.add(p, alpha=rule.weight_decay)
    if rule.momentum:
        momentum_buffer.mul_(rule.momentum).add_(g)
        g = g.add(momentum_buffer, alpha=rule.momentum) if rule.nesterov else momentum_buffer
    p.sub_(g, alpha=rule.lr)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, rule: AdamWRule) -> None:
    m.lerp_(g, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    rate = rule.lr / (1 - rule.beta1 ** float(step))
    denominator = v.sqrt().div_(math.sqrt(1 - rule.beta2 ** float(step))).add_(rule.eps)
    p.mul_(1 - rule.lr * rule.weight_decay).addcdiv_(m, denominator, value=-rate)
