"""The one place where ops enter ``torch.library``: schema, implementation for every device, fake for tracing.

``define`` + ``impl`` and not ``custom_op``: about 5 us a call instead of 18. Autograd lives in the op files, outside
the kernels. Implementations ask the registry, so the dispatcher key covers all backends.
"""

from collections.abc import Callable

import torch

library = torch.library.Library("kr_fast", "DEF")


def define(schema: str, *, fake: Callable) -> Callable:
    """Register the decorated function as the op of ``schema``, with ``fake`` for its output's metadata."""
    name = schema.split("(")[0]

    def add(function: Callable) -> Callable:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kr_fast::{name}", fake, lib=library)
        return function

    return add


def is_plain(tensor: torch.Tensor) -> bool:
    """True where a kernel may take the tensor's address: no subclass, no tracing or dispatch mode around the call."""
    return (type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter) and not (
        torch._C._len_torch_dispatch_stack()
    )
