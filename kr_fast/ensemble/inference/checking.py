"""What two images show of a program: whether it gives the answers of its models' own forward."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.graph.architecture import dense
from kr_fast.ensemble.graph.tracing import Unsupported
from kr_fast.ensemble.networks import answers_rule, checked, failures

EXACT = (torch.float32, torch.float64)


def shown(images: Tensor) -> Tensor:
    """Two images like ``images`` uint8 ``[N, H, W, C]``: the first one, and noise, for that one may be of one color."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, *images.shape[1:]), dtype=torch.uint8, generator=generator).to(images.device)
    return torch.cat([images[:1], noise])[:2]


def answer_of(model: nn.Module, x: Tensor, forward: Callable[..., Any] = operator.call) -> Any:
    """The output of ``model`` for its own copy of ``x``, channels first in memory; its buffers stay as they were."""
    return _observed(model, x, forward)[0]


def own_answer(model: nn.Module, x: Tensor) -> tuple[Tensor, str | None]:
    """Logits for ``x`` ``[2, C, H, W]``, and what a trace could not follow, as far as one call tells.

    Raises: UserError in the model's own words where it fails.
    """
    with failures("ModelArray", "models", answers_rule(x.shape)):
        output, why = _observed(model, x, operator.call)
    return checked("ModelArray", "models", output, x), why


def _observed(model: nn.Module, x: Tensor, forward: Callable[..., Any]) -> tuple[Any, str | None]:
    given, why = x.clone(memory_format=torch.contiguous_format), None
    held = [
        (f"{path}.{name}".lstrip("."), part._buffers, name, value, value.clone())
        for path, part in model.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
        for name, value in part._buffers.items()
        if value is not None
    ]
    try:
        output = forward(model, given)
    finally:
        for full, table, name, value, before in held:
            if table.get(name) is not value or not torch.equal(dense(value), dense(before)):
                why = f"its forward changes {full}"
                value.copy_(before)
                table[name] = value
    return output, why if torch.equal(given, x) else "its forward writes into its input"


def is_close(found: Tensor, wanted: Tensor, room: float = 1e-3, least: float = 1e-5) -> bool:
    """To ``room`` of the largest and ``least``; the same infinities and NaN."""
    found, wanted = found.double(), wanted.double()
    room = least + room * float(wanted.nan_to_num(0, 0, 0).abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=room, equal_nan=True)


def check_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, m: int) -> None:
    """Logits of model ``m`` by a program in ``dtype`` and by its own forward. Raises: Unsupported."""
    room = {"room": 1e-3, "least": 1e-5} if dtype in EXACT else {"room": 0.1, "least": 0.1}
    if not is_close(found, wanted, **room):
        raise Unsupported("its trace does not give its answers" + (f" for model {m}" if m else ""))


def check_all(
    models: Sequence[nn.Module], answer: Callable[[int], Tensor], x: Tensor, wanted: Tensor, dtype: torch.dtype
) -> None:
    """``answer(m)``, logits of a program for the images ``x``, against every model's own; those of model 0 are
    ``wanted``. What a forward takes from elsewhere than its parameters and buffers may differ between models.

    Raises: Unsupported.
    """
    for m, model in enumerate(models):
        found = answer(m)
        check_close(found, wanted[: len(found)] if m == 0 else answer_of(model, x)[: len(found)], dtype, m)
