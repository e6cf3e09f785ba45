"""What a layer does in a private step: compute, send the signal back, and keep what its clipped gradients need.

Autograd meets no parameters, so one backward pass computes signals alone. Each layer is one autograd function, which
meets what the layer read, ``x``, together with the loss's gradient by what it made, ``grad``. There and then it takes
the cheaper way, by counting values a record: it keeps the per-sample gradients where these are not many more than
those of ``x`` and ``grad``, both of which are then free, and the clipped sum will be a product of a vector and a
matrix; else it takes the norms at once and keeps ``x`` and ``grad`` for one weighted gradient, once the clip factors
are known. That pass scales a copy: gradients may be shared with other layers (Bu et al., "Differentially Private
Optimization on Large Model at Small Cost", ICML 2023, call it book-keeping).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kr_fast.backends import native, registry
from kr_fast.backends.calls import Call
from kr_fast.backends.cpu import privacy as kernels
from kr_fast.backends.privacy_arguments import ConvGradients, LinearGradients, records
from kr_fast.ops.privacy.checks import positions
from kr_fast.ops.privacy.conv2d_grad_norms import conv2d_grad_norms
from kr_fast.ops.privacy.conv2d_grad_samples import conv2d_grad_samples
from kr_fast.ops.privacy.embedding_grad_norms import embedding_grad_norms
from kr_fast.ops.privacy.linear_grad_norms import linear_grad_norms
from kr_fast.ops.privacy.linear_grad_samples import linear_grad_samples
from kr_fast.privacy import convolutions
from kr_fast.runtime.errors import fail

# Values of per-sample gradients for one of x and grad, up to which they are kept: to write and read them takes less
# time than another pass over x and grad. At 1 a step of a UNet took 1.07 times as long (AVX2) at the same peak.
MOST_KEPT = 2.0
Samples = list[tuple[str, Tensor]]  # (name of a parameter, its per-sample gradients [B, *shape])


class Layer:
    """A module whose parameters are trained, in a private step.

    Attributes:
        trained: names of its parameters that are; sums: where each one's clipped gradients are added up.
        multiplicity: K consecutive rows of a batch are one record.
        rows: of the batch that goes backward; None: none does.
    """

    def __init__(self, name: str, module: Any, sums: dict[str, Tensor], multiplicity: int):
        self.name, self.module, self.sums, self.multiplicity = name, module, sums, multiplicity
        # Requires a gradient and gets none: it makes the first layer part of the graph.
        self.anchor = torch.zeros((), device=next(iter(sums.values())).device, requires_grad=True)
        self.trained = frozenset(sums)
        self.rows: int | None = None
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a file of the model: without what was computed from records."""
        state = {**vars(self), "sums": {name: torch.zeros_like(each) for name, each in self.sums.items()}}
        return {**state, "rows": None, "_samples": None, "_signals": None, "_squares": None}

    def clear(self) -> None:
        """Forget what was kept of a batch."""
        self._samples: Samples | None = None
        self._signals: tuple[Tensor, Tensor] | None = None
        self._squares: Tensor | None = None

    # ------------------------------------------------------------ of a kind of layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The module's result, and what ``signal`` and ``samples`` need besides ``x``."""
        raise NotImplementedError

    def laid_out(self, x: Tensor) -> Tensor:
        """``x`` as ``forward`` and what follows read it best."""
        return x

    def signal(self, grad: Tensor, x: Tensor, *kept: Tensor) -> Tensor | None:
        """The gradient by ``x``."""
        raise NotImplementedError

    def samples(self, grad: Tensor, x: Tensor, *kept: Tensor) -> Samples:
        """Per-sample gradients of the trained parameters."""
        raise NotImplementedError

    def measured(self, grad: Tensor, x: Tensor, *kept: Tensor) -> tuple[Samples, Tensor | None]:
        """Per-sample gradients, and their norms ``[B]`` where the kernel takes them on its way."""
        return self.samples(grad, x, *kept), None

    def keeps_samples(self, grad: Tensor, x: Tensor) -> bool:
        """Whether the per-sample gradients are few enough, or the bias alone is trained, which no norm is of."""
        own = sum(each.numel() for each in self.sums.values())
        return "weight" not in self.trained or own * (len(x) // self.multiplicity) <= MOST_KEPT * (
            x.numel() + grad.numel()
        )

    def norms(self, grad: Tensor, x: Tensor) -> Tensor:
        """Norms of the per-sample gradients, ``[B]``, where they are not kept."""
        raise NotImplementedError

    def weighted(self, grad: Tensor, x: Tensor, weight: Tensor) -> Samples:
        """Gradients of the sum of records times ``weight``, which has a value a row."""
        raise NotImplementedError

    # ------------------------------------------------------------ of all

    def call(self, x: Tensor) -> Tensor:
        """The module's forward, which records what backward needs."""
        return _Call.apply(self, self.anchor, x) if torch.is_grad_enabled() else self.forward(self.laid_out(x))[0]

    def record(self, grad: Tensor, x: Tensor, *kept: Tensor) -> None:
        """Keep of a call what the clipped sum needs; a further call of the layer adds to its gradients."""
        self.check(x)
        if self._samples is None and self._signals is None and not kept and not self.keeps_samples(grad, x):
            self._squares, self._signals = self.norms(grad, x).square(), (grad, x)
            return
        self.keep(*self.measured(grad, x, *kept))

    def check(self, x: Tensor) -> None:
        """Refuse what was not read row by row."""
        if self.rows is None:
            fail("make_private", "losses", "go backward by private.backward(losses)", "losses.backward()")
        if x.shape[0] != self.rows:
            rule = f"read one row for each loss ({self.rows}), in its order (the batch first, what rows share expanded)"
            fail("backward", f"layer {self.name}", rule, list(x.shape))

    def keep(self, found: Samples, norms: Tensor | None = None) -> None:
        """Keep per-sample gradients, whose norms may be known, or add them to those of an earlier call."""
        if self._signals is not None:
            self._samples, self._signals = self.samples(*self._signals), None
        self._squares = None if norms is None or self._samples is not None else norms.square()
        if self._samples is not None:
            found = [(name, each + more) for (name, each), (_, more) in zip(self._samples, found, strict=True)]
        self._samples = found

    def squares(self) -> Tensor | None:
        """Squared norms ``[B]`` of what was kept; None where the layer had no part in the losses."""
        if self._samples is None or self._squares is not None:
            return self._squares
        # One read each: to square and then to sum writes and reads a copy.
        return sum(torch.linalg.vector_norm(each.flatten(1), dim=1).square() for _, each in self._samples)

    def add(self, factors: Tensor, spoilt: Tensor | None) -> None:
        """Add each record's gradient times its factor to the sums.

        Args:
            factors: ``[B]``.
            spoilt: ``[B]``, records of which nothing may enter a sum, not even times 0; None where there are none.
        """
        if self._samples is not None:
            for name, each in self._samples:
                rows = each.flatten(1)
                rows = rows if spoilt is None else rows.masked_fill(spoilt[:, None], 0)
                self.sums[name].view(-1).addmv_(rows.T, factors)
        elif self._signals is not None:
            grad, x = self._signals
            if spoilt is not None:
                out = spoilt.repeat_interleave(self.multiplicity)
                grad, x = _without(grad, out), _without(x, out)
            weight = factors if self.multiplicity == 1 else factors.repeat_interleave(self.multiplicity)
            for name, each in self.weighted(grad, x, weight):
                self.sums[name].add_(each)
        self.clear()


def _without(values: Tensor, rows: Tensor) -> Tensor:
    return values.masked_fill(rows.view(-1, *[1] * (values.ndim - 1)), 0)


def scaled(values: Tensor, weight: Tensor) -> Tensor:
    """A copy of ``values`` in float32 with each row times its weight: less would round above the bound."""
    return values.float() * weight.view(-1, *[1] * (values.ndim - 1))


class _Call(torch.autograd.Function):
    """A call of a layer."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, x: Tensor) -> Tensor:
        x = layer.laid_out(x)
        y, *kept = layer.forward(x)
        ctx.layer = layer
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None]:
        x, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[2]
        ctx.layer.record(grad, x, *kept)
        return None, None, ctx.layer.signal(grad, x, *kept) if needed else None


def forward_of(layer: Layer) -> Callable[[nn.Module, Tensor], Tensor]:
    """What is called in the place of the module's forward; a copy of the model has copies of its layers."""
    return functools.partial(_forward, layer)


def _forward(layer: Layer, module: nn.Module, input: Tensor) -> Tensor:
    return layer.call(input)


class Conv2d(Layer):
    """``nn.Conv2d`` with zeros as padding."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.form = convolutions.Form.of(self.module)
        both = {"bias": "bias" in self.trained, "multiplicity": self.multiplicity}
        self._options = {**self.form.options(), **both}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (convolutions.forward(self.form, x),)

    def laid_out(self, x: Tensor) -> Tensor:
        return convolutions.laid_out(self.form, x)

    def signal(self, grad: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The gradient by ``x``, and ``residual`` added to it."""
        return convolutions.grad_input(self.form, grad, x, residual)

    def samples(self, grad: Tensor, x: Tensor) -> Samples:
        if "weight" not in self.trained:
            return [("bias", by_record(grad.float().flatten(2).sum(2), self.multiplicity))]
        return named(conv2d_grad_samples(x, grad, self.module.kernel_size, **self._options))

    def measured(self, grad: Tensor, x: Tensor) -> tuple[Samples, Tensor | None]:
        if "weight" not in self.trained or not _is_measured("conv2d_grad_samples", grad, x):
            return super().measured(grad, x)
        call = ConvGradients(x, grad, self.module.kernel_size, **self._options)
        norms = native.empty(records(call))
        return named(kernels.conv2d_grad_samples(call, norms)), norms

    def norms(self, grad: Tensor, x: Tensor) -> Tensor:
        return conv2d_grad_norms(x, grad, self.module.kernel_size, **self._options)

    def weighted(self, grad: Tensor, x: Tensor, weight: Tensor) -> Samples:
        return named(convolutions.grad_weight(self.form, scaled(grad, weight), x, self._options["bias"]))


class Linear(Layer):
    """``nn.Linear`` of rows, or of rows of positions."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (F.linear(x, self.module.weight, self.module.bias),)

    def signal(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad @ self.module.weight.to(grad.dtype)

    def samples(self, grad: Tensor, x: Tensor) -> Samples:
        if "weight" not in self.trained:
            rows = grad.float()
            return [("bias", by_record(rows.flatten(1, -2).sum(1) if grad.ndim > 2 else rows, self.multiplicity))]
        return named(linear_grad_samples(x, grad, bias="bias" in self.trained, multiplicity=self.multiplicity))

    def measured(self, grad: Tensor, x: Tensor) -> tuple[Samples, Tensor | None]:
        if "weight" not in self.trained or not _is_measured("linear_grad_samples", grad, x):
            return super().measured(grad, x)
        call = LinearGradients(positions(x), positions(grad), "bias" in self.trained, self.multiplicity)
        norms = native.empty(records(call))
        return named(kernels.linear_grad_samples(call, norms)), norms

    def norms(self, grad: Tensor, x: Tensor) -> Tensor:
        return linear_grad_norms(x, grad, bias="bias" in self.trained, multiplicity=self.multiplicity)

    def weighted(self, grad: Tensor, x: Tensor, weight: Tensor) -> Samples:
        grad = scaled(grad, weight).flatten(0, -2)
        found = [("weight", grad.T @ x.flatten(0, -2).float())]
        return found + ([("bias", grad.sum(0))] if "bias" in self.trained else [])


class Embedding(Layer):
    """``nn.Embedding``; ``x`` are indices."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (F.embedding(x, self.module.weight, self.module.padding_idx),)

    def signal(self, grad: Tensor, x: Tensor) -> None:
        return None

    def samples(self, grad: Tensor, x: Tensor) -> Samples:
        records, (many, size) = len(x) // self.multiplicity, self.module.weight.shape
        each = torch.zeros(records * many, size, dtype=torch.float32, device=grad.device)
        index = x.reshape(records, -1) + many * torch.arange(records, device=x.device)[:, None]
        each.index_add_(0, index.flatten(), grad.reshape(-1, size).float())
        each = each.view(records, many, size)
        if self.module.padding_idx is not None:
            each[:, self.module.padding_idx] = 0
        return [("weight", each)]

    def norms(self, grad: Tensor, x: Tensor) -> Tensor:
        options = {"padding_idx": self.module.padding_idx, "multiplicity": self.multiplicity}
        return embedding_grad_norms(x, grad, **options)

    def weighted(self, grad: Tensor, x: Tensor, weight: Tensor) -> Samples:
        shape, padding = self.module.weight.shape, self.module.padding_idx
        padding = -1 if padding is None else padding
        grad = scaled(grad, weight)
        return [("weight", torch.ops.aten.embedding_dense_backward(grad, x, shape[0], padding, False))]


def _is_measured(op: str, grad: Tensor, x: Tensor) -> bool:
    """Whether the kernel that ``op`` would run is one that also takes norms."""
    if x.device.type != "cpu" or not x.numel() or not grad.numel():
        return False
    call = Call("cpu", torch.promote_types(x.dtype, grad.dtype))
    return registry.resolve(op, call) is getattr(kernels, op)


def named(found: Sequence[Tensor | None]) -> Samples:
    """Gradients of weight and bias, of which the second may be missing."""
    return [(name, each) for name, each in zip(("weight", "bias"), found, strict=True) if each is not None]


def by_record(rows: Tensor, multiplicity: int) -> Tensor:
    return rows if multiplicity == 1 else rows.unflatten(0, (-1, multiplicity)).sum(1)
