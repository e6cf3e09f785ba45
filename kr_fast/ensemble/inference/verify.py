"""Whether a program gives the answers of its models' own forward, as far as two images show."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.graph.architecture import dense
from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ensemble.networks import answers_rule, checked, failures

EXACT = (torch.float32, torch.float64)


def probe_images(images: Tensor) -> Tensor:
    """Two images like ``images`` uint8 ``[N, H, W, C]``: the first one, and noise, for that one may be of one color."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, *images.shape[1:]), dtype=torch.uint8, generator=generator).to(images.device)
    return torch.cat([images[:1], noise])[:2]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Two images, and what the models say to them.

    ``images``: uint8 ``[2, H, W, C]``; ``query``: the view of them; ``sample``: it as models of ``dtype`` see it;
    ``expected``: model 0's own logits.
    """

    models: Sequence[nn.Module]
    images: Tensor
    query: Query
    sample: Tensor
    expected: Tensor

    def check(self, answer: Callable[[int], Tensor], dtype: torch.dtype) -> None:
        """``answer(m)``, logits of model m by a program in ``dtype`` for these images or the first of them, against
        the model's own. What a forward takes from elsewhere than its parameters and buffers may differ between models.

        Raises: Unsupported.
        """
        for m, model in enumerate(self.models):
            result = answer(m)
            expected = self.expected if m == 0 else answer_of(model, self.sample)
            tolerance = (1e-3, 1e-5) if dtype in EXACT else (0.1, 0.1)
            if not is_close(result, expected[: len(result)], *tolerance):
                raise Unsupported("its trace does not give its answers" + (f" for model {m}" if m else ""))


def _call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def answer_of(model: nn.Module, x: Tensor, forward: Callable[..., Any] = _call) -> Any:
    """The output of ``model`` for its own copy of ``x``, channels first in memory; its buffers stay as they were."""
    return _observed(model, x, forward)[0]


def own_answer(model: nn.Module, x: Tensor) -> tuple[Tensor, str | None]:
    """Logits for ``x`` ``[2, C, H, W]``, and what a trace could not follow, as far as one call tells.

    Raises: UserError in the model's own words where it fails.
    """
    with failures("ModelArray", "models", answers_rule(x.shape)):
        output, why = _observed(model, x, _call)
    return checked("ModelArray", "models", output, x), why


def _observed(model: nn.Module, x: Tensor, forward: Callable[..., Any]) -> tuple[Any, str | None]:
    given, why = x.clone(memory_format=torch.contiguous_format), None
    buffers = [
        (f"{path}.{name}".lstrip("."), part._buffers, name, value, value.clone())
        for path, part in model.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
        for name, value in part._buffers.items()
        if value is not None
    ]
    try:
        output = forward(model, given)
    finally:
        for full, table, name, value, before in buffers:
            if table.get(name) is not value or not torch.equal(dense(value), dense(before)):
                why = f"its forward changes {full}"
                value.copy_(before)
                table[name] = value
    return output, why if torch.equal(given, x) else "its forward writes into its input"


def is_close(result: Tensor, expected: Tensor, relative: float = 1e-3, absolute: float = 1e-5) -> bool:
    """To ``relative`` of the largest and ``absolute``; the same infinities and NaN."""
    result, expected = result.double(), expected.double()
    tolerance = absolute + relative * float(expected.nan_to_num(0, 0, 0).abs().max())
    return result.shape == expected.shape and torch.allclose(result, expected, rtol=0, atol=tolerance, equal_nan=True)
