"""Models by their own forward, one after the other: what cannot be traced, and BatchNorm on a batch's statistics."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kr_fast.ensemble.inference.checking import answer_of, is_close
from kr_fast.ensemble.inference.program import kept
from kr_fast.ensemble.networks import answers_rule, checked, failures

# Images of a chunk, where nothing else is asked for: FEWEST, but as many as keep a tensor within LARGEST bytes, or as
# write four times as many bytes as there are weights. Loops took 1.3 to 2 times as long with 256 images as with 64
# where a tensor had 16 MiB, and 0.6 to 0.9 times where none had 8 MiB or where there are many weights.
FEWEST, MOST, LARGEST = 64, 256, 8 << 20


class Eager:
    """``bind(m)(x)``: logits of model ``m`` for the chunk ``x``, as :class:`program.Program` has it.

    A model sees what a loop over the models would show it: a tensor of its own, with channels first in memory.
    """

    parallel, bytes_per_image = False, 0

    def __init__(
        self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype, chunk: int | None, *, batch_norm: bool
    ):
        """``batch_norm``: BatchNorms take mean and variance of the chunk.

        Raises: UserError if the models do not run in ``dtype``.
        """
        self.models, self.input_dtype, self.batch_norm = models, dtype, batch_norm
        self._chunk, self.chunk = chunk, chunk or MOST
        held = [value for value in (*models[0].parameters(), *models[0].buffers()) if value.is_floating_point()]
        self.casts = any(value.dtype != dtype for value in held)
        self.weight_bytes = sum(value.numel() for value in held) * dtype.itemsize if self.casts else 0
        self.keeps, self.together = kept(self.weight_bytes, len(models))
        self._bound: dict[int, Callable] = {}
        model, x = self._model(0), sample.to(dtype)
        rule = answers_rule(x.shape) + (f" in {str(dtype).removeprefix('torch.')}" if self.casts else "")
        with failures("ModelArray", "models", rule):
            output = answer_of(model, x, self._forward)
        logits = checked("ModelArray", "models", output, x)
        self.padded, self.most = False, FEWEST
        with contextlib.suppress(Exception):  # of a network that takes no other number of images
            self._try_more(model, x, logits)
        self.classes = logits.shape[1]

    def _try_more(self, model: nn.Module, x: Tensor, logits: Tensor) -> None:
        """Where answers are the same beside black images, a chunk is filled up, and all have one shape."""
        with _Written() as few:
            answer_of(model, x, self._forward)
        with _Written() as more:
            found = answer_of(model, torch.cat([x, torch.zeros_like(x)]), self._forward)
        self.padded = not self.batch_norm and is_close(found[: len(x)], logits)
        largest, written = ((a - b) / len(x) for a, b in ((more.largest, few.largest), (more.bytes, few.bytes)))
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        fits = max(LARGEST / max(largest, 1), 4 * weights / max(written, 1), 1)
        self.most = min(max(2 ** int(math.log2(fits)), FEWEST), MOST)

    def fit(self, images: int, free: int) -> None:
        """Take chunks of one size for ``images`` images. What a forward needs of the memory is not known."""
        if self._chunk is None and images:
            self.chunk = -(-images // -(-images // self.most))

    def bind(self, m: int) -> Callable[[Tensor], Tensor]:
        """As :meth:`program.Program.bind`; a copy of the model where it is of another dtype."""
        if m in self._bound:
            return self._bound[m]
        model = self._model(m)

        def run(x: Tensor) -> Tensor:
            return self._forward(model, x.clone(memory_format=torch.contiguous_format))

        if self.keeps:
            self._bound[m] = run
        return run

    def _model(self, m: int) -> nn.Module:
        return copy.deepcopy(self.models[m]).to(self.input_dtype) if self.casts else self.models[m]

    def _forward(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self.batch_norm:
            return model(x)
        norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        try:
            for part in norms:
                part.forward = _batch_forward(part)
            return model(x)
        finally:
            for part in norms:
                part.__dict__.pop("forward", None)


def _batch_forward(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


class _Written(TorchDispatchMode):
    """``bytes`` of all tensors that are made inside, and of the ``largest`` one."""

    bytes = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view:
            size = found.numel() * found.element_size()
            self.bytes, self.largest = self.bytes + size, max(self.largest, size)
        return found
