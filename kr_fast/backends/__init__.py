"""The compiled backends. Each family registers its kernels, under the same names, with :mod:`.registry`.

The reference backend is registered by :mod:`kr_fast.ops`, where the definitions stand beside the ops.
"""

from kr_fast.backends import codes, cpu, cuda, native, registry, triton

__all__ = ["codes", "cpu", "cuda", "native", "registry", "triton"]
