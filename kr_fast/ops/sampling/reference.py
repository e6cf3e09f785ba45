"""Noise, solver steps, bytes and PNG files in plain torch: the definitions."""

import math
import struct
import zlib

import torch
from torch import Tensor

from kr_fast.backends.arguments import SolverStep, SolverTableStep
from kr_fast.backends.registry import kernel, never

_MASK = 0xFFFFFFFF


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # int64 cannot hold the whole product, so the factor is split into halves of 16 bits.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors of 32-bit words. Salmon et al., SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, 0xD2511F53)
        hi1, lo1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


@kernel("philox_normal", "reference", refuses=never)
def philox_normal(ids: Tensor, numel: int, *, seed: int, stream: int | Tensor) -> Tensor:
    """``[B, numel]`` float64 normals: Box-Muller on the words of counter (element // 4, stream, id)."""
    groups = torch.arange((numel + 3) // 4, device=ids.device).expand(len(ids), -1)
    low, high = (ids & _MASK)[:, None].expand_as(groups), (ids >> 32 & _MASK)[:, None].expand_as(groups)
    w0, w1, w2, w3 = philox_words((groups, torch.zeros_like(groups) + stream, low, high), seed)
    pairs = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = (-2 * ((radius_word.double() + 0.5) * 2.0**-32).log()).sqrt()
        angle = angle_word.double() * (2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=2).flatten(1)[:, :numel]


@kernel("pack_uint8", "reference", refuses=never)
def pack_uint8(x: Tensor) -> Tensor:
    """Bytes of images in [-1, 1], NHWC."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = torch.addcmul(x.new_tensor(127.5), x.clamp(-1, 1), x.new_tensor(127.5))
    return scaled.nan_to_num(nan=0.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@kernel("encode_png", "reference", refuses=never)
def encode_png(images: Tensor, size: int) -> Tensor:
    """``[B, size]``: PNG files whose zlib stream holds stored blocks only."""
    batch, height, width, channels = images.shape
    colour_type = (0, 4, 2, 6)[channels - 1]
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))
    files = bytearray()
    for image in images.numpy():
        raw = b"".join(b"\0" + row.tobytes() for row in image)
        blocks = [raw[start : start + 65535] for start in range(0, len(raw), 65535)]
        stream = b"\x78\x01"
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            stream += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
        stream += struct.pack(">I", zlib.adler32(raw))
        files += b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")
    return torch.frombuffer(files, dtype=torch.uint8).view(batch, size) if batch else images.new_empty((0, size))


@kernel("solver_step", "reference", refuses=never)
def solver_step(step: SolverStep) -> None:
    """One linear solver step, term by term, into the tensors of ``out``."""
    x, row, out = step.sample, step.row, step.out
    e = step.model_output.to(x.dtype)
    if step.uncond_output is not None:
        u = step.uncond_output.to(x.dtype)
        e = u + step.guidance * (e - u)
    clean = row.x0_sample * x + row.x0_model * e
    if step.limits is None:
        clean = clean.clamp(-row.clip, row.clip)
    else:
        limit = step.limits.view(-1, *[1] * (x.ndim - 1))
        clean = clean.clamp(-limit, limit) / limit
    y = row.sample * x + row.model * e
    if row.x0 != 0:
        y = y + row.x0 * clean
    for coefficient, h in zip(row.history, step.history, strict=True):
        y = y + coefficient * h
    if row.noise != 0:
        noise = philox_normal(step.ids, math.prod(x.shape[1:]), seed=step.seed, stream=step.stream)
        y = y + row.noise * noise.view(x.shape).to(x.dtype)
    if out.kept is not None:
        keep = row.keep
        out.kept.copy_(keep[0] * x + keep[1] * e + (keep[2] * clean if keep[2] else 0))
    if out.input is not None:
        out.input.copy_((row.next_input * y).repeat(step.copies, 1, 1, 1))
    if out.image is not None:
        out.image.copy_(pack_uint8(y))
    if out.sample is not None:  # last, for it may be the sample that all the others are made of
        out.sample.copy_(y)


@kernel("solver_step_at", "reference", refuses=never)
def solver_step_at(call: SolverTableStep) -> None:
    """The step that ``step`` names, by gathers and scatters, so that nothing is read back from the device."""
    step, samples, kept = call.step.view(1), call.samples, call.kept
    row, slots = call.rows.index_select(0, step)[0], call.slots.index_select(0, step)[0].long()
    x0_sample, x0_model, clip, c_sample, c_model, c_x0, c_noise, next_input = row[:8]
    x = samples.index_select(0, slots[:1])[0]
    e = call.model_output.float()
    if call.uncond_output is not None:
        e = call.uncond_output + call.guidance * (e - call.uncond_output.float())
    limit = clip if call.limits is None else call.limits.view(-1, 1, 1, 1)
    clean = torch.minimum(torch.maximum(x0_sample * x + x0_model * e, -limit), limit)
    clean = clean if call.limits is None else clean / limit
    y = c_sample * x + c_model * e + torch.where(c_x0 != 0, c_x0 * clean, 0.0)
    for k in range(4):
        slot = slots[4 + k : 5 + k]
        h = samples.index_select(0, (-1 - slot).clamp(min=0))[0]
        if len(kept):
            h = torch.where(slot >= 0, kept.index_select(0, slot.clamp(min=0))[0], h)
        y = y + torch.where(row[15] > k, row[11 + k] * h, 0.0)
    if call.ids is not None:
        noise = philox_normal(call.ids, math.prod(x.shape[1:]), seed=call.seed, stream=call.stream + call.step)
        y = y + c_noise * noise.view(x.shape).to(x.dtype)
    if len(kept):
        into = slots[2:3].clamp(min=0)
        value = row[8] * x + row[9] * e + torch.where(row[10] != 0, row[10] * clean, 0.0)
        kept.index_copy_(0, into, torch.where(slots[2] >= 0, value, kept.index_select(0, into)[0])[None])
    samples.index_copy_(0, slots[1:2], y[None])
    if call.input is not None:
        call.input.copy_((next_input * y).repeat(call.copies, 1, 1, 1))
    if call.image is not None:
        call.image.copy_(pack_uint8(y))
