"""The four backends. Each module registers its kernels, under the same function names, with :mod:`.registry`."""

from kr_fast.backends import (
    cpu,
    cuda,
    membership_reference,
    reference,
    registry,
    training_reference,
    triton,
    winograd_reference,
)

__all__ = [
    "cpu",
    "cuda",
    "membership_reference",
    "reference",
    "registry",
    "training_reference",
    "triton",
    "winograd_reference",
]
