"""Other forwards, attributes and layouts for a model's modules, all taken off again by ``restore()``."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.runtime.errors import fail


class Patches:
    """What was replaced in ``model``. As a context manager it restores at the end of the block.

    ``patched`` counts the replaced forwards by class.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.patched: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self):
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the original forwards and weight layouts back; outputs are bit-equal to those before. Again: nothing."""
        while self._undo:
            self._undo.pop()()

    def forward(self, module: nn.Module, function: Callable) -> None:
        """Call ``function(module, ...)`` in the place of the module's own forward."""
        if "forward" in vars(module):
            rule = "have its own forwards (call restore() on an optimized one)"
            fail("optimize", "model", rule, type(module).__name__)
        module.forward = functools.partial(function, module)
        self._undo.append(lambda: delattr(module, "forward"))
        name = type(module).__name__
        self.patched[name] = self.patched.get(name, 0) + 1

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute of ours; a tensor moves with the module but is not saved with it.

        Set after :meth:`forward`, which refuses a module whose attributes are those of another's patches.
        """
        if isinstance(value, Tensor):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)
        self._undo.append(lambda: delattr(module, name))

    def channels_last(self, weight: nn.Parameter) -> None:
        """Lay out the weight of a convolution channels_last."""
        stride = weight.stride()
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

        def back() -> None:
            memory = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
            weight.data = memory.copy_(weight.data)

        self._undo.append(back)
