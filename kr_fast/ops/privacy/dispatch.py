"""What the ops of this family do alike: choose a kernel by both tensors, make room for norms."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.backends.privacy_arguments import accumulated


def kernel(op: str, x: Tensor, grad_output: Tensor) -> Any:
    """The kernel of ``op`` for the dtype that both tensors are promoted to."""
    return registry.resolve(op, Call(x.device.type, torch.promote_types(x.dtype, grad_output.dtype)))


def empty_norms(x: Tensor, grad_output: Tensor, *options: Any) -> Tensor:
    """Room for a norm a record; ``multiplicity`` is the last of ``options``."""
    return x.new_empty(x.shape[0] // options[-1], dtype=accumulated(x, grad_output))
