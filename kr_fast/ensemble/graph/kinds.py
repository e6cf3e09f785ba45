"""Which of torch's layers a node of a traced graph is: called as a module, or as a function of a module's weights.

A subclass that keeps its parent's forward is its parent. One with a forward of its own is traced into, and then its
function of its own weights is found here: ``F.batch_norm(x, self.running_mean, ...)`` is a BatchNorm.
"""

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from kr_fast.ensemble.graph.trace import attribute, keeps_forward

# (attribute of oneDNN's epilogue, scalars, algorithm)
Activation = tuple[str, tuple[float, ...], str]
Modules = Mapping[str, nn.Module]

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_CONV2D = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_LINEAR = {"input": None, "weight": None, "bias": None}
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
RELU: Activation = ("relu", (), "")
_METHODS = {"relu": RELU, "relu_": RELU, "sigmoid": ("sigmoid", (), ""), "tanh": ("tanh", (), "")}
_FUNCTIONS = {
    F.relu: RELU,
    torch.relu: RELU,
    F.relu6: ("hardtanh", (0.0, 6.0), ""),
    F.silu: ("swish", (), ""),
    F.hardswish: ("hardswish", (), ""),
    torch.sigmoid: ("sigmoid", (), ""),
    torch.tanh: ("tanh", (), ""),
}
_MODULES = {
    nn.ReLU: RELU,
    nn.ReLU6: ("hardtanh", (0.0, 6.0), ""),
    nn.SiLU: ("swish", (), ""),
    nn.Hardswish: ("hardswish", (), ""),
    nn.Sigmoid: ("sigmoid", (), ""),
    nn.Tanh: ("tanh", (), ""),
}


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_sum(node: fx.Node) -> bool:
    """Whether the node is ``a + b`` and no multiple of it."""
    sums = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
    return node.target in sums.get(node.op, ()) and len(node.args) == 2 and not node.kwargs


def pixel_step(node: fx.Node) -> tuple[int, int] | None:
    """``(a, b)`` where the node is x[:, :, ::a, ::b]."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) != 4:
        return None
    steps = []
    for part in node.args[1]:
        if not isinstance(part, slice) or (part.start, part.stop) not in ((None, None), (0, None)):
            return None
        steps.append(1 if part.step is None else part.step)
    return (steps[2], steps[3]) if steps[:2] == [1, 1] and all(isinstance(s, int) for s in steps) else None


def does_nothing(node: fx.Node, modules: Modules) -> bool:
    """Whether the node is its input in eval mode."""
    if node.op == "call_module":
        return any(keeps_forward(modules[node.target], kind) for kind in NOTHING)
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments["training"] is False


def activation(node: fx.Node, modules: Modules) -> Activation | None:
    """The activation that the node is."""
    if node.op == "call_module":
        return _module_activation(modules[node.target])
    kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if len(node.args) > 1 and not (len(node.args) == 2 and node.target in (F.relu, F.silu, F.hardswish, F.relu6)):
        return None  # their second argument is ``inplace``
    if node.op == "call_method":
        return None if kwargs else _METHODS.get(node.target)
    if node.target is F.gelu and set(kwargs) <= {"approximate"}:
        return ("gelu", (), kwargs.get("approximate", "none"))
    return None if kwargs or node.op != "call_function" else _FUNCTIONS.get(node.target)


def _module_activation(module: nn.Module) -> Activation | None:
    if keeps_forward(module, nn.GELU):
        return ("gelu", (), module.approximate)
    if keeps_forward(module, nn.LeakyReLU):
        return ("leaky_relu", (module.negative_slope,), "")
    return next((each for kind, each in _MODULES.items() if keeps_forward(module, kind)), None)


def convolution(node: fx.Node, modules: Modules) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Name of the nn.Conv2d whose weights the node takes, stride and padding; None where it is no such convolution."""
    if node.op == "call_module":
        module = modules[node.target]
        padding = _padding(module) if keeps_forward(module, nn.Conv2d) else None
        return None if padding is None else (node.target, module.stride, padding)
    given = _arguments(node, F.conv2d, _CONV2D)
    name = given and _owner(given, modules, nn.Conv2d)
    if not name or not all(_numbers(given[key]) for key in ("stride", "padding", "dilation")):
        return None
    module, (stride, padding, dilation) = modules[name], (_pair(given[k]) for k in ("stride", "padding", "dilation"))
    return (name, stride, padding) if (dilation, given["groups"]) == (module.dilation, module.groups) else None


def linear(node: fx.Node, modules: Modules) -> str | None:
    """Name of the nn.Linear whose weights the node takes."""
    if node.op == "call_module":
        return node.target if keeps_forward(modules[node.target], nn.Linear) else None
    given = _arguments(node, F.linear, _LINEAR)
    return given and _owner(given, modules, nn.Linear)


def batch_norm(node: fx.Node, modules: Modules) -> str | None:
    """Name of the BatchNorm with running statistics whose numbers the node takes."""
    if node.op == "call_module":
        module = modules[node.target]
        plain = any(keeps_forward(module, kind) for kind in _NORMS) and module.running_mean is not None
        return node.target if plain else None
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    given, names = call.arguments, ("running_mean", "running_var", "weight", "bias")
    name = _owner(given, modules, nn.modules.batchnorm._BatchNorm, names)
    if not name or modules[name].running_mean is None or given["training"] is not False:
        return None
    return name if given["eps"] == modules[name].eps else None


def _arguments(node: fx.Node, function: Any, defaults: dict[str, Any]) -> dict[str, Any] | None:
    if node.op != "call_function" or node.target is not function:
        return None
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def _owner(
    given: Mapping[str, Any], modules: Modules, kind: type[nn.Module], names: tuple[str, ...] = ("weight", "bias")
) -> str | None:
    """The module of ``kind`` whose attributes ``names`` are the arguments of the same names."""
    weight = given[names[0]]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    owner = weight.target.rpartition(".")[0]
    if not isinstance(modules.get(owner), kind):
        return None
    for name in names:
        value = given[name]
        own = f"{owner}.{name}" if attribute(modules[owner], name) is not None else None
        if (value.target if isinstance(value, fx.Node) and value.op == "get_attr" else value) != own:
            return None
    return owner


def _numbers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple | list) and all(isinstance(v, int) for v in value))


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _padding(conv: nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros on each side of both axes, or None where there is something else or more on one side."""
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(span % 2 for span in spans) else tuple(span // 2 for span in spans)


def is_pool_of_pairs(module: nn.Module | None, before: tuple[int, ...]) -> bool:
    """The largest of 2x2 pixels, without overlap, of images ``before`` ``[N, C, H, W]``."""
    if not keeps_forward(module, nn.MaxPool2d) or min(before[2:]) < 2 or module.ceil_mode or module.return_indices:
        return False
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.stride)]
    return pairs == [(2, 2), (2, 2)] and module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))
