"""One step of SGD with Nesterov momentum for M models at once, each with a learning rate of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kr_fast.backends import registry
from kr_fast.backends.arguments import Sgd
from kr_fast.backends.calls import Call
from kr_fast.ops import _check
from kr_fast.ops._library import define

_OP = "model_sgd"


@define(
    "model_sgd(Tensor(a!) weight, Tensor(b!) velocity, Tensor grad, Tensor rate, Tensor momentum, int[] sizes, "
    "float[] decays) -> ()",
    fake=lambda *arguments: None,
)
def _impl(weight, *rest):
    *tensors, sizes, decays = rest
    run = registry.resolve(_OP, Call(weight.device.type, weight.dtype))
    run(Sgd(weight, *tensors, tuple(sizes), tuple(decays)))


def model_sgd(
    weight: Tensor,
    velocity: Tensor,
    grad: Tensor,
    rate: Tensor,
    momentum: Tensor,
    sizes: Sequence[int],
    decays: Sequence[float],
) -> None:
    """In place, for each parameter p of each model m with a rate that is not 0:

    ``g = grad + decay[p] weight``, ``velocity = momentum[m] velocity + g``,
    ``weight -= rate[m] (g + momentum[m] velocity)``.

    A model whose rate is 0 stays as it is, velocity too, whatever its gradient. With ``velocity`` 0 at the start these
    are the steps of ``torch.optim.SGD(nesterov=True)``.

    Args:
        weight, velocity, grad: ``[sum_p M sizes[p]]`` contiguous float32 (float64 on the reference backend): parameter
            after parameter, each ``[M, sizes[p]]``.
        rate, momentum: ``[M]`` of the same dtype, on the same device.
        sizes: numbers in a parameter of one model.
        decays: weight decay of each parameter.
    Raises: TypeError or ValueError naming the argument.
    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the
        form of torch's documentation of ``SGD``.
    """
    _check.tensor(_OP, "weight", weight, ndim=1, dtypes=(torch.float32, torch.float64))
    _check.tensor(_OP, "rate", rate, ndim=1, dtypes=(weight.dtype,))
    if len(sizes) != len(decays):
        _check.fail(_OP, "decays", f"hold {len(sizes)} numbers, as sizes", len(decays))
    models = len(rate)
    lengths = {"weight": models * sum(sizes), "velocity": len(weight), "grad": len(weight)}
    lengths |= {"rate": models, "momentum": models}
    for (name, count), value in zip(lengths.items(), (weight, velocity, grad, rate, momentum), strict=True):
        _check.operand(_OP, name, value, (count,), like=weight, dtypes=(weight.dtype,))
        if value.requires_grad:
            _check.fail(_OP, name, "not require grad", value)
    torch.ops.kr_fast.model_sgd(weight, velocity, grad, rate, momentum, sizes, decays)
