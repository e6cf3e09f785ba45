"""Kernels in C++: AVX2 or AVX-512 by run-time choice, plain C++ elsewhere. Callers have checked their arguments."""

from kr_fast.backends.cpu import distillation, membership, nn, privacy, sampling

__all__ = ["distillation", "membership", "nn", "privacy", "sampling"]
