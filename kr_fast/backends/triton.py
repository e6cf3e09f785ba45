"""Kernels of ``kr_fast.kernels`` (Triton). Triton is imported by the first call and not by ``import kr_fast``."""

import importlib.util
import os

import torch

from kr_fast.backends import registry

if importlib.util.find_spec("triton") is None:
    registry.mark_unavailable("triton", "triton is not installed; pip install triton")


def accepts(*dtypes: torch.dtype):
    """A predicate: tensors of one of ``dtypes`` on a GPU, or anywhere under TRITON_INTERPRET=1."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def refuses(device: str, dtype: torch.dtype, size: int) -> str | None:
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors must be on cuda (or TRITON_INTERPRET=1 set), got {device}"
        if dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}"
        return None

    return refuses
