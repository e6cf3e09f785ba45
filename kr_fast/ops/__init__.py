"""One file per op, by family: check arguments, autograd, dispatch; the definition in plain torch beside it.

The kernels live below, in :mod:`kr_fast.backends`.
"""

from kr_fast.ops import batched, distillation, membership, nn, privacy, sampling

__all__ = ["batched", "distillation", "membership", "nn", "privacy", "sampling"]
