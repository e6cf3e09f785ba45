"""Triton kernel of solver_step: one read of each input, one write of each output, noise from registers.

The operations are those of csrc/common/sampling/solver_row.h, each as it is written there, so the bits are the CPU's.
The coefficients are run-time numbers and what a step does is not: one compilation serves every step of a solver's kind.
"""

import triton
import triton.language as tl
from kr_fast.kernels.rounding import store
from kr_fast.kernels.sampling.pack_uint8 import to_byte
from kr_fast.kernels.sampling.philox_normal import EXACT, WARPS, grid, normals_of, program_elements, tile, tile_of


@triton.jit
def _clamp(a, low, high):
    above = tl.where(a > high, high, a)  # NaN passes, so that it can be reported
    return tl.where(above < low, low, above)


@triton.jit(do_not_specialize=["seed", "stream"])
def step(
    x, cond, uncond, ids, limits, h0, h1, h2, h3, y, kept, input, image, batch, numel, pixels, blocks,
    x0_sample, x0_model, clip, c_sample, c_model, c_x0, c_noise, next_input, keep0, keep1, keep2, c0, c1, c2, c3,
    guidance, seed: tl.int64, stream: tl.int64,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, CLEAN: tl.constexpr, NOISY: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Pointers that are None are neither read nor written. LAST: the network's outputs have interleaved channels."""
    rows, live, groups = tile_of(batch, blocks, ROWS, GROUPS)
    elements = program_elements(blocks, GROUPS)
    mask = live[:, None] & (elements < numel)[None, :]
    base = rows[:, None] * numel
    at = base + elements[None, :]
    offset = at
    if CHANNELS > 1:
        offset = base + (elements % pixels * CHANNELS + elements // pixels)[None, :]
    seen = offset if LAST else at
    value = tl.load(x + at, mask=mask, other=0.0)
    e = tl.load(cond + seen, mask=mask, other=0.0).to(tl.float32)
    if uncond is not None:
        u = tl.load(uncond + seen, mask=mask, other=0.0).to(tl.float32)
        e = tl.fma(guidance, e - u, u)
    out = tl.fma(c_model, e, c_sample * value)
    if kept is not None:
        keep = tl.fma(keep1, e, keep0 * value)
    if CLEAN:
        p = tl.fma(x0_model, e, x0_sample * value)
        if limits is None:
            p = _clamp(p, -clip, clip)
        else:
            limit = tl.load(limits + rows, mask=live, other=1.0)
            p = _clamp(p, -limit[:, None], limit[:, None]) * tl.div_rn(1.0, limit)[:, None]
        out = tl.fma(c_x0, p, out)
        if kept is not None:
            keep = tl.fma(keep2, p, keep)
    if kept is not None:
        tl.store(kept + at, keep, mask=mask)
    if h0 is not None:
        out = tl.fma(c0, tl.load(h0 + at, mask=mask, other=0.0), out)
    if h1 is not None:
        out = tl.fma(c1, tl.load(h1 + at, mask=mask, other=0.0), out)
    if h2 is not None:
        out = tl.fma(c2, tl.load(h2 + at, mask=mask, other=0.0), out)
    if h3 is not None:
        out = tl.fma(c3, tl.load(h3 + at, mask=mask, other=0.0), out)
    if NOISY:
        out = tl.fma(c_noise, normals_of(tl.load(ids + rows, mask=live, other=0), stream, seed, groups), out)
    if y is not None:
        tl.store(y + at, out, mask=mask)
    if image is not None:
        tl.store(image + offset, to_byte(out), mask=mask)
    if input is not None:
        for copy in tl.static_range(COPIES):
            target = copy * tl.cast(batch, tl.int64) * numel + offset
            store(input, target, out * next_input, mask, input.dtype.element_ty == tl.bfloat16)


def solver_step(call, channels_last: bool) -> None:
    """As the backends' function of this name; both of the network's outputs are contiguous or ``channels_last``."""
    sample, row, history, missing = call.sample, call.row, call.history, 4 - len(call.history)
    if sample.numel() == 0:
        return
    batch, numel, channels = len(sample), sample[0].numel(), sample.shape[1] if sample.ndim == 4 else 1
    shape = tile(batch, numel)
    programs, blocks = grid(batch, numel, shape)
    inputs = (sample, call.model_output, call.uncond_output, call.ids, call.limits, *history, *[None] * missing)
    coefficients = (*map(float, row.numbers()), *[0.0] * missing, float(call.guidance))
    constants = {"CLEAN": row.needs_clean(call.out.kept is not None), "NOISY": row.noise != 0, "COPIES": call.copies}
    constants |= {"CHANNELS": channels, "LAST": channels_last, **shape, **EXACT}
    sizes = (batch, numel, numel // channels, blocks)
    step[(programs,)](*inputs, *call.out, *sizes, *coefficients, call.seed, call.stream, **constants, num_warps=WARPS)
