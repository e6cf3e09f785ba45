"""Products of float32 that are products of float32, whatever the caller lets torch round them to."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def _settings() -> list[tuple[Any, str, Any]]:
    """(where, name, value that keeps to float32) of what lets torch take TF32 or bfloat16 for it."""
    on = torch.backends
    if hasattr(on.cuda.matmul, "fp32_precision"):  # since torch 2.9, which refuses a mixture of old and new names
        places = (on.cuda.matmul, on.cudnn.conv, on.mkldnn.matmul, on.mkldnn.conv)
        return [(each, "fp32_precision", "ieee") for each in places]
    return [(on.cuda.matmul, "allow_tf32", False), (on.cudnn, "allow_tf32", False)]


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """A clip factor bounds a sum only if that is made of the numbers that the norm was taken of, unrounded."""
    settings = _settings()
    before = [getattr(where, name) for where, name, _ in settings]
    try:
        for where, name, value in settings:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)
