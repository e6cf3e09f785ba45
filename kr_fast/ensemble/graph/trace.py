"""A module's forward as a torch.fx graph that says what the module does, and leaves the module as it was.

torch's own tracer stores tensors that a forward makes as attributes of the module, takes the first model's buffers for
everybody's, and asks for arguments that have defaults. Here tensors that a forward makes are constants of the graph,
parameters and buffers are looked up in each model, and the module is called with one argument, the images.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.proxy import ParameterProxy

from kr_fast.ensemble.networks import error_text

CONSTANT = "_constant_"  # begins the names of tensors that a forward makes
TABLES = ("_parameters", "_buffers", "_modules")


class Unsupported(Exception):
    """The module cannot be traced, or not folded; the message says why."""


@dataclasses.dataclass
class Traced:
    """The graph of ``model``, and the tensors that its forward made: what get_attr nodes name that is in no model."""

    model: nn.Module
    graph: fx.Graph
    constants: dict[str, Tensor]


def keeps_forward(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``module`` computes what torch's ``kind`` does: it is one, or of a subclass that keeps what it runs."""
    if not isinstance(module, kind) or "forward" in vars(module):
        return False
    runs = ("forward", "__call__", "_conv_forward")
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in runs)


def torch_kind(module: nn.Module) -> type[nn.Module]:
    """The nearest of torch's classes whose forward ``module`` keeps; its own class where there is none."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
    return next((kind for kind in kinds if keeps_forward(module, kind)), type(module))


def trace(model: nn.Module) -> Traced:
    """The graph of ``model``, called with images alone.

    Raises: Unsupported with the words of whatever its code raises when it meets a proxy.
    """
    for name, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise Unsupported(f"{name or 'the model'} has forward hooks")
    with contextlib.suppress(Exception):  # of a user's code, which may need a buffer's numbers: these are tried next
        return _traced(model, buffers=True)
    try:
        return _traced(model, buffers=False)
    except Exception as error:
        raise Unsupported(f"torch.fx cannot trace it ({error_text(error)})") from None


def _traced(model: nn.Module, buffers: bool) -> Traced:
    tracer = _Tracer(model, buffers)
    with _untouched(model):
        graph = tracer.trace(model)
    for node in graph.nodes:
        # Channels lie last here, so that a view which the forward takes may not exist.
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
    return Traced(model, graph, tracer.constants)


def shapes(traced: Traced, example: Tensor) -> None:
    """Every node's ``meta["tensor_meta"]`` for ``example``.

    Raises: Unsupported with the words of what fails.
    """
    try:
        _Shapes(traced).run(example)
    except Exception as error:  # of a user's forward, on tensors that lie otherwise than in it
        raise Unsupported(f"its trace does not run ({error_text(error)})") from None


def attribute(model: nn.Module, path: str) -> Any:
    """What ``path`` ("layers.0.scale") names in ``model``."""
    value = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _Tracer(fx.Tracer):
    """``buffers``: as nodes of the graph, as parameters are, and not as their numbers."""

    def __init__(self, model: nn.Module, buffers: bool):
        super().__init__()
        self.constants: dict[str, Tensor] = {}
        self.names = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
        self.alive: list[Tensor] = []  # what is named by its id has to live on
        self.buffers, self.weights = buffers, {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's layers, and subclasses that leave the forward to them."""
        if isinstance(m, torch.jit.ScriptModule):
            return True
        kind = next(kind for kind in type(m).__mro__ if "forward" in vars(kind))
        own = "forward" in vars(m) or kind in (nn.Sequential, nn.Module)
        return not own and kind.__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        model = self.root  # an object may have a forward other than its class's
        return (lambda x: model.forward(x)), [self.create_proxy("placeholder", "x", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None or not (self.buffers or isinstance(attr_val, nn.Parameter)):
            return attr_val
        if name not in self.weights:
            self.weights[name] = _Weight(self, self.create_node("get_attr", name, (), {}), name, attr_val)
        return self.weights[name]

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        if id(a) not in self.names:
            name = self.tensor_attrs.get(a)  # an attribute that is no buffer
            self.names[id(a)] = name or f"{CONSTANT}{len(self.constants)}"
            self.alive.append(a)
            if not name:
                self.constants[self.names[id(a)]] = a.detach()
        return self.create_node("get_attr", self.names[id(a)], (), {})


class _Value(fx.Proxy):
    """What a forward computes, which it may write into."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Weight(ParameterProxy):
    """A parameter or buffer, of which the shape is known: that of all models."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, value: Tensor):
        fx.Proxy.__init__(self, node, tracer)
        self.param, self.name = value, name

    def size(self, dim: int | None = None) -> Any:
        return self.param.size() if dim is None else self.param.size(dim)


class _Shapes(fx.Interpreter):
    """As torch's ShapeProp, which prints a traceback where a node fails."""

    def __init__(self, traced: Traced):
        super().__init__(traced.model, graph=traced.graph)
        self.extra_traceback, self.constants = False, traced.constants

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else attribute(self.module, target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["tensor_meta"] = _extract_tensor_metadata(result)
        return result


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """What a forward assigns to its modules is a proxy here: the attributes from before are put back."""
    parts = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    before = [(part, dict(vars(part)), [dict(vars(part)[name]) for name in TABLES]) for part in parts]
    try:
        yield
    finally:
        for part, attributes, tables in before:
            vars(part).clear()
            vars(part).update(attributes)
            for name, table in zip(TABLES, tables, strict=True):
                vars(part)[name].clear()
                vars(part)[name].update(table)
