"""Triton kernel of philox_normal: the operations of csrc/common/sampling/philox.h, one by one, so the same bits.

Every fused multiply-add is written as one, the square root and the conversions are those that round to nearest, and
kernels that call this are launched with ``**EXACT``, so that the compiler contracts nothing else.
"""

import torch
import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}
TILE = 256  # counters of a program: four normals each
WARPS = 4


@triton.jit
def _as_int(a):
    return a.to(tl.int32, bitcast=True)


@triton.jit
def _as_float(a):
    return a.to(tl.float32, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four words of a counter; all uint32. Salmon et al., SC 2011."""
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, 0xD2511F53)
        hi2 = tl.umulhi(c2, 0xCD9E8D57)
        lo0 = c0 * 0xD2511F53
        lo2 = c2 * 0xCD9E8D57
        c0 = hi2 ^ c1 ^ k0
        c2 = hi0 ^ c3 ^ k1
        c1 = lo2
        c3 = lo0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius(x):
    u = tl.fma(x.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32 and 2^-33
    bits = _as_int(u) - 0x3F3504F3  # sqrt(1/2)
    e = (bits >> 23).to(tl.float32)
    f = _as_float((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    log_m = tl.fma(f * f, tl.fma(p, f, -0.5), f)
    log_u = tl.fma(e, 0.693147180, log_m)
    return tl.sqrt_rn(log_u * -2.0)


@triton.jit
def _angle(x):
    turn = x + 0x20000000
    t = ((turn & 0x3FFFFFFF) - 0x20000000).to(tl.int32, bitcast=True).to(tl.float32) * 1.46291807926715969e-9
    z = t * t
    ps = tl.fma(tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1)
    sine = tl.fma(ps * z, t, t)
    pc = tl.fma(tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2)
    cosine = tl.fma(pc * z, z, tl.fma(z, -0.5, 1.0))
    low_bit = turn << 1
    exchange = (_as_int(cosine) ^ _as_int(sine)) & (_as_int(low_bit) >> 31)
    c = _as_float(_as_int(cosine) ^ exchange ^ _as_int((turn ^ low_bit) & 0x80000000))
    s = _as_float(_as_int(sine) ^ exchange ^ _as_int(turn & 0x80000000))
    return c, s


@triton.jit
def philox_normal4(group, stream, id_low, id_high, k0, k1):
    """The four normals of each counter, along a new last axis; arguments are uint32 of one shape, keys scalars."""
    w0, w1, w2, w3 = philox(group, stream, id_low, id_high, k0, k1)
    r0, r2 = _radius(w0), _radius(w2)
    c0, s0 = _angle(w1)
    c2, s2 = _angle(w3)
    pairs = tl.join(tl.join(r0 * c0, r2 * c2), tl.join(r0 * s0, r2 * s2))
    return pairs.reshape(group.shape[0], group.shape[1], 4)


@triton.jit
def normals_of(ids, stream, seed, groups):
    """Normals ``[R, 4 G]`` of counters ``groups`` [G] of images ``ids`` [R] int64."""
    seed = seed.to(tl.uint64)
    low = (ids & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (ids >> 32).to(tl.uint32)[:, None]
    shape: tl.constexpr = [ids.shape[0], groups.shape[0]]
    z = philox_normal4(
        tl.broadcast_to(groups.to(tl.uint32)[None, :], shape),
        tl.broadcast_to(stream.to(tl.uint32), shape),
        tl.broadcast_to(low, shape),
        tl.broadcast_to(high, shape),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return z.reshape(ids.shape[0], 4 * groups.shape[0])


@triton.jit
def tile_of(batch, blocks, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(images, whether they exist, counters) of this program, ``blocks`` of which share a set of images."""
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups = (program % blocks).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    return rows, rows < batch, groups


@triton.jit
def program_elements(blocks, GROUPS: tl.constexpr):
    """Elements of an image that belong to the counters of :func:`tile_of`."""
    return (tl.program_id(0) % blocks).to(tl.int64) * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)


@triton.jit(do_not_specialize=["seed", "stream"])
def normals(ids, out, batch, numel, blocks, seed: tl.int64, stream: tl.int64, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows, live, groups = tile_of(batch, blocks, ROWS, GROUPS)
    z = normals_of(tl.load(ids + rows, mask=live, other=0), stream, seed, groups)
    elements = program_elements(blocks, GROUPS)[None, :]
    tl.store(out + rows[:, None] * numel + elements, z, mask=live[:, None] & (elements < numel))


def tile(batch: int, numel: int) -> dict[str, int]:
    """Images and counters of a program: small images share one."""
    groups = min(triton.next_power_of_2(triton.cdiv(numel, 4)), TILE)
    return {"ROWS": min(TILE // groups, triton.next_power_of_2(batch)), "GROUPS": groups}


def grid(batch: int, numel: int, tile: dict[str, int]) -> tuple[int, int]:
    """(programs, programs that share a set of images)."""
    blocks = triton.cdiv(numel, 4 * tile["GROUPS"])
    return triton.cdiv(batch, tile["ROWS"]) * blocks, blocks


def philox_normal(ids: torch.Tensor, numel: int, seed: int, stream: int) -> torch.Tensor:
    """``[B, numel]`` float32."""
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    if out.numel():
        shape = tile(len(ids), numel)
        programs, blocks = grid(len(ids), numel, shape)
        normals[(programs,)](ids, out, len(ids), numel, blocks, seed, stream, **shape, num_warps=WARPS, **EXACT)
    return out
