"""torch's SGD and AdamW with gradient clipping and the moving average of the weights, all of it in one pass."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import AdamWRule, SGDRule
from kr_fast.backends.calls import Call
from kr_fast.ops.nn.optimizer_step import OptimizerState, StaleStateError, is_dense, optimizer_step, share_memory
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.training.ema import EMA, like_parameter

_OP = "optimizer_step"


def _untraced(method: Callable) -> Callable:
    """torch's ``method`` of an optimizer without its decorator, unless torch's compiler is imported.

    The decorator keeps the method out of compiled code, for which it imports the compiler: 1 s at the first call.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else inspect.unwrap(method))(self, *args, **kwargs)

    return call


class _OnePass(torch.optim.Optimizer):
    """What :class:`SGD` and :class:`AdamW` share. Groups, schedulers, hooks and saved states are torch's own.

    Attributes:
        grad_norm: of the last step, before clipping; not finite where that step wrote nothing. On a GPU a tensor, and
            only where there is a ``max_grad_norm``; steps are taken whatever it is.
        ema: the :class:`EMA` of the weights, or None.
    """

    plain: type[torch.optim.Optimizer]  # torch's class
    unsupported: tuple[str, ...]  # options of a group, which only a loaded state can set, that must be off

    grad_norm: float | Tensor = 0.0
    ema: EMA | None = None
    _max_grad_norm: float = math.inf
    _state: OptimizerState | None = None
    _refused: tuple[torch.device, torch.dtype] | None = None  # where the state cannot be made: torch steps there

    def _set_up(self, max_grad_norm: float | None, ema_decay: float | None) -> None:
        name = type(self).__name__
        if max_grad_norm is not None and not max_grad_norm > 0:
            fail(name, "max_grad_norm", "be above 0", max_grad_norm)
        self._max_grad_norm = math.inf if max_grad_norm is None else float(max_grad_norm)
        if ema_decay is not None:
            self.ema = EMA(self._parameters(), ema_decay)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, update, average. Where the norm of the gradients is not finite, nothing is written.

        Returns what ``closure`` does, if there is one, as torch's optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = next(p for group in self.param_groups for p in group["params"])
        if self._refused == (first.device, first.dtype) or not self._step():
            self._step_by_torch()
        return loss

    def _step(self) -> bool:
        """Step by the package's kernel, if one runs here."""
        ema = self.ema
        rules = [self._rule(group) for group in self.param_groups]
        options = {
            "max_norm": self._max_grad_norm,
            "average_weight": 0.0 if ema is None else 1 - ema.next_decay(),
        }
        try:
            if self._state is None:
                raise StaleStateError
            self.grad_norm = optimizer_step(self._state, rules, **options)
        except StaleStateError:
            self._state = self._made_state()
            if self._state is None:
                return False
            self.grad_norm = optimizer_step(self._state, rules, **options)
        if ema is not None and math.isfinite(self.grad_norm):
            ema.optimization_step += 1
        return True

    @property
    def skipped(self) -> bool:
        """Whether the last step wrote nothing, since its gradients were not finite."""
        return isinstance(self.grad_norm, float) and not math.isfinite(self.grad_norm)

    def _step_by_torch(self) -> None:
        parameters = self._parameters()
        if parameters[0].device.type == "cpu":
            self.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        elif self._max_grad_norm < math.inf:  # a tensor: nothing here waits for a GPU
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        if not self.skipped:
            inspect.unwrap(self.plain.step)(self)  # without the hooks, which this class's own step has run
            if self.ema is not None:
                self.ema.step()

    def _made_state(self) -> OptimizerState | None:
        """The tensors of the kernel; None, and a line on the logger, where torch's own step is taken."""
        parameters = self._parameters()
        if self.ema is not None:
            self.ema.fit_to_parameters()
        reason = self._refusal(parameters)
        if reason is not None:
            self._refused = parameters[0].device, parameters[0].dtype
            logger.info("%s takes torch's own step: %s", type(self).__name__, reason)
            return None
        lists = [self._tensors(p, group) for group in self.param_groups for p in group["params"]]
        groups = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        averages = None if self.ema is None else self.ema.averages
        first, second, steps = ([each[kind] for each in lists] for kind in range(3))
        adamw = [] if second[0] is None else [second, steps]
        return OptimizerState(parameters, first, *adamw, averages=averages, groups=groups)

    def _refusal(self, parameters: list[Tensor]) -> str | None:
        for group in self.param_groups:
            for name in self.unsupported:
                if group.get(name):
                    return f"{name} must be off, got {group[name]}"
        for p in parameters:
            if type(p) not in (Tensor, torch.nn.Parameter):
                return f"parameters must be plain tensors, got {type(p).__name__}"
            if (p.device, p.dtype) != (parameters[0].device, parameters[0].dtype):
                return f"parameters must be on one device in one dtype, got {p.dtype} on {p.device}"
        call = Call(parameters[0].device.type, parameters[0].dtype)
        if not registry.runs_preferred(_OP, call):
            return registry.refusal(_OP, "cpu", call) or "a backend is forced that has no optimizer_step"
        if not all(map(is_dense, parameters)) or share_memory(parameters):
            return "each parameter must fill memory of its own, got overlapping or strided ones"
        return None

    zero_grad = _untraced(torch.optim.Optimizer.zero_grad)
    state_dict = _untraced(torch.optim.Optimizer.state_dict)
    load_state_dict = _untraced(torch.optim.Optimizer.load_state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; not after an average has been started."""
        if self.ema is not None:
            fail(type(self).__name__, "param_group", "be given before there is a moving average", "one more")
        _untraced(torch.optim.Optimizer.add_param_group)(self, param_group)
        self._state = self._refused = None

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("grad_norm", "ema", "_max_grad_norm")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # which load_state_dict calls too
        self._state = self._refused = None


def _at_least_one(where: str, params: Iterable[Any]) -> list[Any]:
    parameters = list(params)
    if not parameters:
        fail(where, "params", "hold at least one parameter", parameters)
    return parameters


class SGD(_OnePass, torch.optim.SGD):
    """``torch.optim.SGD`` whose step clips and averages in the same pass: on a CPU in float32 by one kernel.

    Elsewhere torch's own functions do the same one after the other, which the logger says once.

    Args:
        params, lr, momentum, weight_decay, nesterov: as torch's.
        max_grad_norm: the global norm to which gradients are clipped in the update; None: they are not. The gradients
            themselves are written by torch's own step alone.
        ema_decay: in [0, 1], of the moving average ``ema``; None: there is none.
    Raises: ValueError naming the argument.
    """

    plain = torch.optim.SGD
    unsupported = ("dampening", "maximize", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        torch.optim.SGD.__init__(self, _at_least_one("SGD", params), lr, momentum, 0, weight_decay, nesterov)
        self._set_up(max_grad_norm, ema_decay)

    def _rule(self, group: dict[str, Any]) -> SGDRule:
        return SGDRule(float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])

    def _tensors(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, None, None]:
        if group["momentum"] == 0:
            return None, None, None
        state = self.state[p]
        buffer = state.get("momentum_buffer")
        state["momentum_buffer"] = torch.zeros_like(p) if buffer is None else like_parameter(buffer, p)
        return state["momentum_buffer"], None, None


class AdamW(_OnePass, torch.optim.AdamW):
    """``torch.optim.AdamW`` whose step clips and averages in the same pass: see :class:`SGD`.

    Args:
        params, lr, betas, eps, weight_decay: as torch's.
        max_grad_norm, ema_decay: as of :class:`SGD`.
    Raises: ValueError naming the argument.
    """

    plain = torch.optim.AdamW
    unsupported = ("amsgrad", "maximize", "capturable", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        torch.optim.AdamW.__init__(self, _at_least_one("AdamW", params), lr, betas, eps, weight_decay)
        self._set_up(max_grad_norm, ema_decay)

    def _rule(self, group: dict[str, Any]) -> AdamWRule:
        return AdamWRule(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])

    def _tensors(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[p]
        if not state:
            zeros = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update(step=zeros, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = like_parameter(state[name], p)
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]
