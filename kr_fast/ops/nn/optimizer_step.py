"""One step of an optimizer over all parameters: clipping by the global norm, the update, the average of the weights."""

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry, structs
from kr_fast.backends.arguments import AdamWRule, OptimizerStep, OptimizerTensors, SGDRule
from kr_fast.backends.calls import Call
from kr_fast.ops import _check

_OP = "optimizer_step"
_grad, _bytes = operator.attrgetter("grad"), operator.attrgetter("nbytes")


class StaleStateError(ValueError):
    """The :class:`OptimizerState` must be made again.

    A parameter has moved since, as by ``module.to(...)``, or a group has momentum that had none.
    """


class OptimizerState:
    """Parameters and the state of their optimizer, checked once for many calls of :func:`optimizer_step`.

    A parameter fills one run of memory in some order of its dimensions (contiguous, channels_last), and every tensor of
    its state has its shape, strides, dtype and device. For SGD ``first`` holds what torch calls ``momentum_buffer``,
    zeros before the first step; for AdamW ``first``, ``second`` and ``steps`` hold ``exp_avg``, ``exp_avg_sq`` and
    ``step`` (float32, no dimensions).

    Args:
        parameters: float32 (float64 on the reference backend), on one device; no two may share memory.
        first: of each parameter; None for SGD without momentum.
        second, steps: of each parameter for AdamW, else left out.
        averages: of each parameter, or left out.
        groups: each parameter's index into the rules of :func:`optimizer_step`; by default all have the first.
    Raises: TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        first: Sequence[Tensor | None],
        second: Sequence[Tensor] | None = None,
        steps: Sequence[Tensor] | None = None,
        averages: Sequence[Tensor] | None = None,
        groups: Sequence[int] | None = None,
    ):
        self.parameters, count, self.adamw = list(parameters), len(parameters), second is not None
        if not count:
            _check.fail(_OP, "parameters", "hold at least one tensor", parameters)
        for p in self.parameters:
            _check.tensor(_OP, "parameters", p, dtypes=(torch.float32, torch.float64))
            _check.operand(
                _OP, "parameters", p, p.shape, like=parameters[0], dtypes=(parameters[0].dtype,), contiguous=False
            )
            if not is_dense(p):
                _check.fail(_OP, "parameters", "fill one run of memory", f"strides {p.stride()} of {list(p.shape)}")
        if share_memory(self.parameters):
            _check.fail(_OP, "parameters", "not share memory", f"{count} tensors that do")
        groups = [0] * count if groups is None else list(groups)
        given = {"first": first, "second": second, "steps": steps, "averages": averages}
        lists = {name: [None] * count if each is None else list(each) for name, each in given.items()}
        for name, values in {**lists, "groups": groups}.items():
            if len(values) != count:
                _check.fail(_OP, name, f"hold {count} elements, as parameters", len(values))
        needed = ("first", "second", "steps") if self.adamw else ()
        for name, values in lists.items():
            for p, value in zip(self.parameters, values, strict=True):
                if value is not None or name in needed:
                    _check_state(name, value, p)
        self.tensors = OptimizerTensors(self.parameters, groups, **lists)
        self.table = structs.optimizer_table(self.tensors)
        # While these live, the memory at the addresses is the parameters' and no other tensor's.
        self._memory = [p.detach() for p in self.parameters]
        self.call = Call(self._memory[0].device.type, self._memory[0].dtype)
        self.num_groups = max(groups) + 1
        self.no_momentum = {group for group, each in zip(groups, lists["first"], strict=True) if each is None}
        self._addresses, self._bytes = self.table[2].tolist(), list(map(_bytes, self._memory))
        self._strides = list(map(Tensor.stride, self._memory))
        self._empty = not all(self._bytes)

    def gradients(self) -> tuple[list[Tensor | None], list[int]]:
        """The parameters' gradients in the layouts of the parameters, and their addresses, 0 for None.

        torch lets a parameter have no gradient of another dtype or device; ``map`` runs loops in C.
        """
        if list(map(Tensor.data_ptr, self.parameters)) != self._addresses:
            raise StaleStateError(f"{_OP}: parameters must lie where they lay when the state was made")
        grads = list(map(_grad, self.parameters))
        if not self._empty and all(map(operator.is_not, grads, [None] * len(grads))):
            try:
                strides = list(map(Tensor.stride, grads))
            except RuntimeError:  # a sparse one, which is named below
                strides = []
            if strides == self._strides and list(map(_bytes, grads)) == self._bytes:
                return grads, list(map(Tensor.data_ptr, grads))
            if strides and all(map(same_order, grads, self.parameters)):
                self._strides = strides  # dimensions of one element may have any
        grads = [None if g is None else _laid_out(g, p) for g, p in zip(grads, self.parameters, strict=True)]
        # An empty gradient is one, although its address is 0.
        return grads, [0 if g is None else g.data_ptr() or 1 for g in grads]


def optimizer_step(
    state: OptimizerState,
    rules: Sequence[SGDRule] | Sequence[AdamWRule],
    *,
    max_norm: float = float("inf"),
    average_weight: float = 0.0,
) -> float:
    """In place, with the gradients ``p.grad``, which stay as they are; returns their global norm before clipping.

    ``g = grad min(1, max_norm / (norm + 1e-6))`` with the norm over all numbers of all gradients, as
    ``torch.nn.utils.clip_grad_norm_``; then for each parameter with a gradient, by its group's rule,

    - SGD: ``g += weight_decay p``, ``m = momentum m + g``, ``p -= lr (g + momentum m)`` with ``nesterov``, else
      ``p -= lr m``; where momentum is 0, ``p -= lr g``, and m stays as it is;
    - AdamW: ``step += 1``, ``m += (1 - beta1) (g - m)``, ``v = beta2 v + (1 - beta2) g^2``, ``p -= lr weight_decay p``,
      ``p -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)``;

    and for each parameter with an average, ``average -= average_weight (average - p)``.

    If the norm is not finite (NaN, infinity, or squares beyond float32), nothing is written. Bits do not depend on the
    number of threads.

    Args:
        state: the tensors.
        rules: of each group, all :class:`SGDRule` or all :class:`AdamWRule`.
        max_norm: above 0.
        average_weight: in [0, 1].
    Raises: TypeError or ValueError naming the argument; StaleStateError.
    Source: Sutskever et al., ICML 2013, and Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
        in the form of torch's documentation.
    """
    if len(rules) < state.num_groups:
        _check.fail(_OP, "rules", f"hold {state.num_groups} groups", len(rules))
    kind = AdamWRule if state.adamw else SGDRule
    for group, rule in enumerate(rules):
        if type(rule) is not kind:
            _check.fail(_OP, "rules", f"be {kind.__name__} for such a state", rule, TypeError)
        if kind is SGDRule and rule.momentum and group in state.no_momentum:
            raise StaleStateError(f"{_OP}: momentum must be 0 where first is None, got {rule.momentum}")
    if not max_norm > 0:
        _check.fail(_OP, "max_norm", "be above 0", max_norm)
    if not 0 <= average_weight <= 1:
        _check.fail(_OP, "average_weight", "be in [0, 1]", average_weight)
    grads, addresses = state.gradients()
    run = registry.resolve(_OP, state.call)
    with torch.no_grad():
        return run(OptimizerStep(state.tensors, state.table, grads, addresses, rules, max_norm, average_weight))


def _check_state(name: str, value: Tensor | None, p: Tensor) -> None:
    shape, dtype = ((), torch.float32) if name == "steps" else (p.shape, p.dtype)
    _check.operand(_OP, name, value, shape, like=p, dtypes=(dtype,), contiguous=False)
    if name != "steps" and not same_order(value, p):
        _check.fail(_OP, name, f"have its parameter's strides {p.stride()}", value.stride())
    if value.requires_grad:
        _check.fail(_OP, name, "not require grad", value)


def _laid_out(grad: Tensor, p: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        _check.fail(_OP, "gradients", "be dense", grad.layout, TypeError)
    _check.operand(_OP, "gradients", grad, p.shape, like=p, dtypes=(p.dtype,), contiguous=False)
    return grad if same_order(grad, p) else torch.empty_like(p).copy_(grad)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order of the dimensions."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return all(s == t for s, t, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether two of these dense tensors lie one over the other."""
    runs = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(runs))
