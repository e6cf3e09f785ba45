"""Models by their own forward, one after the other: what cannot be traced, and BatchNorm on a batch's statistics."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kr_fast.ensemble.inference.runner import ArrayOptions, PerModelRunner
from kr_fast.ensemble.inference.verify import answer_of, is_close
from kr_fast.ensemble.networks import answers_rule, checked, failures

# Images of a chunk, where nothing else is asked for: FEWEST, but as many as keep a tensor within LARGEST bytes, or as
# write four times as many bytes as there are weights. Loops took 1.3 to 2 times as long with 256 images as with 64
# where a tensor had 16 MiB, and 0.6 to 0.9 times where none had 8 MiB or where there are many weights.
FEWEST, MOST, LARGEST = 64, 256, 8 << 20
REFERENCE_BATCH = 5000  # of the published LiRA code


class Eager(PerModelRunner):
    """``bind(m)(x)``: logits of model ``m`` for the chunk ``x`` by its own forward.

    A model sees what a loop over the models would show it: a tensor of its own, with channels first in memory. With
    ``bn="batch"`` BatchNorms take mean and variance of the chunk.
    """

    channels_first = True

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, options: ArrayOptions):
        """``sample``: two images of the models' dtype. Raises: UserError if the models do not run in the options'."""
        dtype, self.batch_norm = options.dtype, options.bn == "batch"
        self.input_dtype, self._chunk = dtype, options.chunk or (REFERENCE_BATCH if self.batch_norm else None)
        self.chunk = self._chunk or MOST
        own = [value for value in (*models[0].parameters(), *models[0].buffers()) if value.is_floating_point()]
        self.casts = any(value.dtype != dtype for value in own)
        weight_bytes = sum(value.numel() for value in own) * dtype.itemsize if self.casts else 0
        self.start(models, options, sample.device, weight_bytes)
        model, x = self._model(0), sample.to(dtype)
        rule = answers_rule(x.shape) + (f" in {str(dtype).removeprefix('torch.')}" if self.casts else "")
        with failures("ModelArray", "models", rule):
            output = answer_of(model, x, self._forward)
        logits = checked("ModelArray", "models", output, x)
        self.most = FEWEST
        with contextlib.suppress(Exception):  # of a network that takes no other number of images
            self._try_more(model, x, logits)
        self.classes = logits.shape[1]

    def _try_more(self, model: nn.Module, x: Tensor, logits: Tensor) -> None:
        """Where answers are the same beside black images, a chunk is filled up, and all have one shape."""
        with _Written() as few:
            answer_of(model, x, self._forward)
        with _Written() as more:
            among_black = answer_of(model, torch.cat([x, torch.zeros_like(x)]), self._forward)
        self.padded = not self.batch_norm and is_close(among_black[: len(x)], logits)
        largest, written = ((a - b) / len(x) for a, b in ((more.largest, few.largest), (more.bytes, few.bytes)))
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        fits = max(LARGEST / max(largest, 1), 4 * weights / max(written, 1), 1)
        self.most = min(max(2 ** int(math.log2(fits)), FEWEST), MOST)

    @property
    def recorded_chunk(self) -> int | None:
        """The bits of an answer may follow from the chunk."""
        return self.chunk

    def fit(self, images: int) -> None:
        """As in :class:`Runner`: chunks of one size. What a forward needs of the memory is not known."""
        if self._chunk is None and images:
            self.chunk = -(-images // -(-images // self.most))

    def make(self, m: int) -> Callable[[Tensor], Tensor]:
        """As in :class:`PerModelRunner`; a copy of the model where it is of another dtype."""
        model = self._model(m)
        return lambda x: self._forward(model, x.clone(memory_format=torch.contiguous_format))

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
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            size = result.numel() * result.element_size()
            self.bytes, self.largest = self.bytes + size, max(self.largest, size)
        return result
