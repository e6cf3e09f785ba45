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
def float32_products(**cudnn: bool) -> Iterator[None]:
    """Without TF32, as definitions are, and a clip factor bounds a sum only of numbers that are not rounded again.

    ``cudnn``: further settings. Its own ``flags`` raises an error for some that a user may have made since torch 2.9,
    and leaves TF32 on by others.
    """
    settings = [*_settings(), *((torch.backends.cudnn, name, value) for name, value in cudnn.items())]
    before = [getattr(where, name) for where, name, _ in settings]
    try:
        for where, name, value in settings:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)
