"""Standard normals addressed by image id, equal to the bit on every backend."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import call, define


def _fake(ids: Tensor, numel: int, seed: int, stream: int) -> Tensor:
    return ids.new_empty((ids.shape[0], numel), dtype=torch.float32)


@define("philox_normal(Tensor ids, SymInt numel, int seed, int stream) -> Tensor", fake=_fake)
def _impl(ids: Tensor, numel: int, seed: int, stream: int) -> Tensor:
    _check.ids("philox_normal", ids)
    run = registry.resolve("philox_normal", Call(ids.device.type, torch.float32))
    return run(ids, numel, seed=seed, stream=stream).to(torch.float32)


def philox_normal(
    ids: Tensor, shape: int | Sequence[int], *, seed: int, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normals that depend on (seed, image id, stream, element) and on nothing else.

    Element ``e`` of image ``i`` is word ``e % 4`` of Philox4x32-10 with counter
    ``(e // 4, stream, i mod 2^32, i // 2^32)`` and key ``seed``, turned into normals by Box-Muller:
    ``sqrt(-2 ln((w0 + 1/2) / 2^32)) (cos, sin)(2 pi w1 / 2^32)``.
    The same bits on every CPU and GPU, whatever the batch (the ``reference`` backend differs by rounding).

    Args:
        ids: ``[B]`` int64 or another integer dtype, >= 0 (which is not checked on a GPU).
        shape: shape of one image, for example ``(3, 32, 32)``; a number ``n`` stands for ``(n,)``.
        seed: data-set seed in [0, 2^63).
        stream: in [0, 2^32); 0 is the initial noise, ``1 + i`` the noise of step ``i``.
        dtype: float32, or bfloat16 / float16 / float64 converted from it.
    Returns: ``[B, *shape]`` on the device of ``ids``.
    Raises: TypeError or ValueError naming the argument.
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; Box and Muller 1958.
    """
    op = "philox_normal"
    _check.tensor(op, "ids", ids, ndim=1)
    ids = _check.integers(op, "ids", ids)
    seed = _check.integer(op, "seed", seed, 0, 2**63)
    stream = _check.integer(op, "stream", stream, 0, 2**32)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        _check.fail(op, "dtype", "be a floating point dtype", dtype, TypeError)
    shape = _sizes(op, shape)
    numel = math.prod(shape)
    if numel >= 2**34:
        _check.fail(op, "shape", "hold fewer than 2^34 elements an image", tuple(shape))
    out = call(torch.ops.kr_fast.philox_normal.default, ids, numel, seed, stream)
    return out.view(ids.shape[0], *shape).to(dtype)


def _sizes(op: str, shape: int | Sequence[int]) -> list[int]:
    """``shape`` as ints, of a number as well, and of numpy's."""
    if isinstance(shape, numbers.Integral):
        shape = (shape,)
    if not isinstance(shape, Sequence):
        _check.fail(op, "shape", "be an int or a sequence of ints", shape, TypeError)
    for size in shape:
        if not isinstance(size, (numbers.Integral, torch.SymInt)):
            _check.fail(op, "shape", "hold ints", tuple(shape), TypeError)
        if size < 0:
            _check.fail(op, "shape", "hold sizes >= 0", tuple(shape))
    return [size if isinstance(size, torch.SymInt) else int(size) for size in shape]
