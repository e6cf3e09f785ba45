"""Kernels in CUDA C++, on the current stream of the tensors' device."""

from kr_fast.backends.cuda import batched, distillation, membership, nn, sampling

__all__ = ["batched", "distillation", "membership", "nn", "sampling"]
