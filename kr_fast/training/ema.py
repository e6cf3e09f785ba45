"""The moving average of the weights, by the rule of diffusers' ``EMAModel``, whose saved state it reads and writes."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail

_OP = "EMA"
# Of EMAModel's state: what is fixed here.
_FIXED = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}


class EMA:
    """``average -= (1 - d_t) (average - p)`` for each parameter, from its first value; ``t`` counts the steps from 1:

    ``d_1 = 0`` and ``d_t = min(decay, t / (9 + t))``, as ``EMAModel``'s defaults have it.

    An optimizer of this package moves it in its own step.

    Args:
        parameters: those to average.
        decay: in [0, 1].
    Attributes:
        averages: a tensor for each parameter.
        optimization_step: steps so far.
    """

    def __init__(self, parameters: list[Tensor], decay: float):
        if not 0 <= decay <= 1:
            fail(_OP, "decay", "be in [0, 1]", decay)
        self.parameters, self.decay, self.optimization_step = list(parameters), float(decay), 0
        self.averages = [p.detach().clone() for p in self.parameters]

    def next_decay(self) -> float:
        """``d_t`` of the step that comes next."""
        step = self.optimization_step
        return min(self.decay, (1 + step) / (10 + step)) if step else 0.0

    def fit_to_parameters(self) -> None:
        """Give each average its parameter's device, dtype and layout, which ``module.to(...)`` may have changed."""
        for i, p in enumerate(self.parameters):
            self.averages[i] = like_parameter(self.averages[i], p)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step and move all averages."""
        weight = 1 - self.next_decay()
        self.optimization_step += 1
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], weight)

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within the ``with`` block the parameters have the values of their averages."""
        return replaced(self.parameters, self.averages)

    def state_dict(self) -> dict[str, Any]:
        """That of ``EMAModel``; the tensors are the averages themselves."""
        position = {"decay": self.decay, "optimization_step": self.optimization_step}
        return {**position, **_FIXED, "shadow_params": list(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, or from that of an ``EMAModel`` with its defaults."""
        for name, value in _FIXED.items():
            if state.get(name, value) != value:
                fail(_OP, name, f"be {value}", state[name])
        shapes = [list(each.shape) for each in state["shadow_params"]]
        if shapes != (expected := [list(p.shape) for p in self.parameters]):
            fail(_OP, "shadow_params", f"have the shapes of the {len(expected)} parameters", f"{len(shapes)} tensors")
        self.decay, self.optimization_step = state["decay"], state["optimization_step"]
        for average, value in zip(self.averages, state["shadow_params"], strict=True):
            average.copy_(value)


class PowerEMA(EMA):
    """A moving average whose memory is a fixed share of all steps so far, so that training may end after any of them:

    ``d_t = (1 - 1 / t)^(power + 1)``. The weight of step ``s`` is thereby the integral of ``tau^power`` over
    [s - 1, s], as a share of that over [0, t]. The default has a standard deviation of 0.1 t (sigma_rel).

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, section 3.1.
    """

    def __init__(self, parameters: list[Tensor], power: float = 6.94):
        if not 0 <= power < float("inf"):
            fail("PowerEMA", "power", "be at least 0", power)
        super().__init__(parameters, 1.0)
        self.power = float(power)

    def next_decay(self) -> float:
        """``d_t`` of the step that comes next."""
        return (1 - 1 / (self.optimization_step + 1)) ** (self.power + 1)


@contextlib.contextmanager
@torch.no_grad()
def replaced(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Within the ``with`` block the parameters have other values."""
    parameters = [p.detach() for p in parameters]
    before = [p.clone() for p in parameters]
    torch._foreach_copy_(parameters, list(values))
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, before)


def like_parameter(value: Tensor, p: Tensor) -> Tensor:
    """``value`` itself if it has the parameter's device, dtype and strides, else a copy that has them."""
    if value.device == p.device and value.dtype == p.dtype and value.stride() == p.stride():
        return value
    return torch.empty_like(p, requires_grad=False).copy_(value)
