"""Kernels in Triton, which the first call imports and ``import kr_fast`` does not."""

from kr_fast.backends.triton import batched, distillation, membership, nn, privacy, sampling

__all__ = ["batched", "distillation", "membership", "nn", "privacy", "sampling"]
