"""A module's forward for M models at once, each on a batch of its own, in training mode: traced, and run on stacks.

Values are ``[M, N, C, H, W]`` with channels last in memory. Convolutions, linear layers and BatchNorm (with the sum
and the ReLU behind it) are model-batched ops; elementwise functions and pools see the models as more images; any other
function or module without random numbers goes through ``torch.func.vmap``. What cannot be done so is refused with the
reason, and the caller trains one model after the other.
"""

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap

from kr_fast.ensemble.graph import kinds
from kr_fast.ensemble.graph.dataflow import dead_after
from kr_fast.ensemble.graph.trace import Unsupported, keeps_forward, torch_kind, trace
from kr_fast.ensemble.training.layer_ops import group_norm, layer_norm, linear, pixel_mean
from kr_fast.ops.batched.model_batch_norm import model_batch_norm
from kr_fast.ops.batched.model_conv2d import model_conv2d

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RANDOM = (nn.modules.dropout._DropoutNd,)
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
ELEMENTWISE += (nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.CELU, nn.Mish, nn.Softplus)
UNARY = {F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.softplus}
UNARY |= {torch.relu, torch.sigmoid, torch.tanh, operator.neg, "relu", "sigmoid", "tanh", "float", "contiguous"}
IN_PLACE = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}
BINARY = {*IN_PLACE.values(), torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div"}


class StackedGraph:
    """``graph(weights, x)``: logits ``[M, N, K]`` and what each BatchNorm saw, of M copies of ``model``.

    ``weights`` maps names of parameters and buffers to stacks ``[M, ...]``; those in ``channels_last`` have a
    convolution's input channels at the end. ``norms`` are the names of the BatchNorms in the order of their calls.

    Raises: Unsupported.
    """

    def __init__(self, model: nn.Module):
        model = copy.deepcopy(model).train()
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if len(names) != len(list(model.parameters())):
            raise Unsupported("modules share a parameter")
        traced = trace(model)
        if traced.constants:
            raise Unsupported("its forward makes tensors of its own")
        self.graph, self.parts = traced.graph, dict(model.named_modules(remove_duplicate=False))
        self.channels_last: set[str] = set()
        self.jumps: dict[fx.Node, fx.Node] = {}  # strided 1x1 convolution -> what the slice before it reads
        self.norms: list[str] = []
        self._out_of_place()
        self.fused = self._fuse()
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        self.steps = [(node, self._bind(node)) for node in self.nodes if node not in self.skipped]
        if len(set(self.norms)) != len(self.norms):
            raise Unsupported("a BatchNorm is called twice")
        self.dead = dead_after([node for node, _ in self.steps], self.output, self._reads)

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
        """``x``: ``[M, N, C, H, W]``. The second result is (mean ``[M, C]``, biased variance, numbers a channel)."""
        values: dict[fx.Node, Any] = {}
        state = _Call(weights, x, values, [])
        for node, run in self.steps:
            values[node] = run(state)
            for each in self.dead[node]:
                values.pop(each, None)
        return values[self.output], state.seen

    def part(self, node: fx.Node) -> nn.Module | None:
        return self.parts[node.target] if node.op == "call_module" else None

    def _out_of_place(self) -> None:
        """In-place functions become plain ones; who reads their input later reads their result."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            part, changes = self.part(node), False
            if node.op == "call_function" and node.target in IN_PLACE:
                node.target, changes = IN_PLACE[node.target], True
            elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
                node.target, changes = node.target[:-1], True
            elif node.kwargs.get("inplace"):
                node.kwargs, changes = {**node.kwargs, "inplace": False}, True
            elif getattr(part, "inplace", False):
                part.inplace, changes = False, True
                self.in_place_parts = {*getattr(self, "in_place_parts", ()), part}
            elif part is not None and part in getattr(self, "in_place_parts", ()):
                changes = True
            if changes and isinstance(node.args[0], fx.Node):
                source = node.args[0]
                for user in list(source.users):
                    if order[user] > order[node]:
                        user.replace_input_with(source, node)

    def _fuse(self) -> dict[fx.Node, tuple[fx.Node, fx.Node | None, bool]]:
        """Node -> (BatchNorm, residual, ReLU) that it does together; the others are skipped."""
        fused, self.skipped = {}, set()
        for node in self.graph.nodes:
            if not keeps_forward(self.part(node), nn.BatchNorm2d):
                continue
            last, residual, relu = node, None, False
            user = kinds.only_user(last)
            if user is not None and kinds.is_sum(user):
                other = user.args[1] if user.args[0] is node else user.args[0]
                taken = user in fused or user in self.skipped
                if isinstance(other, fx.Node) and other is not node and not taken:
                    last, residual = user, other
            user = kinds.only_user(last)
            if user is not None and kinds.activation(user, self.parts) == kinds.RELU:
                last, relu = user, True
            if last is not node:
                fused[last] = (node, residual, relu)
                self.skipped.add(node)
                if residual is not None and relu:
                    self.skipped.add(last.args[0])
        return fused

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        if node in self.jumps:
            return [self.jumps[node]]
        if node not in self.fused:
            return node.all_input_nodes
        norm, residual, _ = self.fused[node]
        return [norm.args[0], *([] if residual is None else [residual])]

    def _bind(self, node: fx.Node) -> Callable[["_Call"], Any]:
        if node in self.fused:
            norm, residual, relu = self.fused[node]
            return self._norm(norm, residual, relu)
        if node.op == "placeholder":
            return lambda call: call.x
        if node.op == "get_attr":
            return lambda call: call.weight(node.target, call.x.dtype)
        if node.op == "call_module":
            return self._module(node)
        return _function(node)

    def _module(self, node: fx.Node) -> Callable[["_Call"], Any]:
        part, name, source = self.part(node), node.target, node.args[0]
        kind = torch_kind(part)
        if kind is nn.Conv2d:
            return self._conv(node, part)
        if kind is nn.Linear:
            return lambda call: linear(call.values[source], call.own(name, "weight"), call.own(name, "bias"))
        if kind in NORMS:
            return self._norm(node, None, False)
        if kind is nn.Identity or (isinstance(part, RANDOM) and part.p == 0):
            return lambda call: call.values[source]
        if isinstance(part, RANDOM):
            raise Unsupported(f"{name} draws random numbers")
        if kind in ELEMENTWISE:
            return lambda call: part(call.values[source])
        if kind is nn.AdaptiveAvgPool2d and part.output_size in (1, (1, 1)):
            return lambda call: pixel_mean(call.values[source], True)
        if kind in kinds.POOLS and not getattr(part, "return_indices", False):
            return lambda call: part(call.values[source].flatten(0, 1)).unflatten(0, call.x.shape[:2])
        if kind is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1):
            return lambda call: call.values[source].flatten(2)
        if kind is nn.GroupNorm:
            groups, eps = part.num_groups, part.eps
            return lambda call: group_norm(
                call.values[source], groups, call.own(name, "weight"), call.own(name, "bias"), eps
            )
        if kind is nn.LayerNorm:
            shape, eps = part.normalized_shape, part.eps
            return lambda call: layer_norm(
                call.values[source], shape, call.own(name, "weight"), call.own(name, "bias"), eps
            )
        if list(part.buffers()) or any(isinstance(each, nn.modules.batchnorm._NormBase) for each in part.modules()):
            raise Unsupported(f"{name} ({kind.__name__}) has buffers")
        return self._vmapped(node, part)

    def _conv(self, node: fx.Node, part: nn.Conv2d) -> Callable[["_Call"], Tensor]:
        padding = part.padding
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(part.dilation, part.kernel_size, strict=True)]
            if padding == "same" and any(each % 2 for each in reach):
                raise Unsupported(f"{node.target} pads one side more than the other")
            padding = [each // 2 for each in reach] if padding == "same" else [0, 0]
        if part.padding_mode != "zeros":
            raise Unsupported(f"{node.target} pads by {part.padding_mode}")
        self.channels_last.add(f"{node.target}.weight")
        name, source, stride = node.target, node.args[0], part.stride
        step = kinds.pixel_step(source) if tuple(padding) == (0, 0) and part.kernel_size == (1, 1) else None
        if step:  # a 1x1 convolution of every other pixel is a strided one
            source = self.jumps[node] = source.args[0]
            stride = (stride[0] * step[0], stride[1] * step[1])
        options = {"stride": stride, "padding": padding, "dilation": part.dilation, "groups": part.groups}

        def run(call: _Call) -> Tensor:
            x = call.values[source].movedim(2, -1).contiguous()
            return model_conv2d(x, call.own(name, "weight"), call.own(name, "bias"), **options).movedim(-1, 2)

        return run

    def _norm(self, node: fx.Node, residual: fx.Node | None, relu: bool) -> Callable[["_Call"], Tensor]:
        part, name, source = self.part(node), node.target, node.args[0]
        if part.running_mean is None or part.momentum is None:
            raise Unsupported(f"{name} has no running statistics with a fixed momentum")
        self.norms.append(name)

        def run(call: _Call) -> Tensor:
            x, other = call.values[source], None if residual is None else call.values[residual]
            flat = x.ndim == 3
            x = x[:, :, None, None] if flat else x.movedim(2, -1).contiguous()
            apart = other is not None and (other.shape != call.values[source].shape or other.dtype != x.dtype)
            inside = None if other is None or apart else other.movedim(2, -1).contiguous()
            affine, options = (call.own(name, "weight"), call.own(name, "bias")), {"eps": part.eps}
            y, mean, var = model_batch_norm(x.contiguous(), *affine, inside, relu=relu and not apart, **options)
            call.seen.append((mean, var, x.shape[1:4].numel()))
            y = y[:, :, 0, 0] if flat else y.movedim(-1, 2)
            if apart:
                y = (y + other).relu() if relu else y + other
            return y

        return run

    def _vmapped(self, node: fx.Node, part: nn.Module) -> Callable[["_Call"], Any]:
        names = [name for name, _ in part.named_parameters()]

        def run(call: _Call) -> Any:
            tensors, rebuild = call.arguments(node)
            weights = [call.weight(f"{node.target}.{name}", call.x.dtype) for name in names]

            def one(own: list[Tensor], given: list[Tensor]) -> Any:
                args, kwargs = rebuild(given)
                return functional_call(part, dict(zip(names, own, strict=True)), args, kwargs)

            return vmap(one)(weights, tensors)

        return run


class _Call:
    """One call of a graph: stacked weights, input, values so far, and what each BatchNorm saw."""

    def __init__(self, weights: Mapping[str, Tensor], x: Tensor, values: dict, seen: list):
        self.weights, self.x, self.values, self.seen = weights, x, values, seen

    def own(self, module: str, name: str) -> Tensor | None:
        return self.weights.get(f"{module}.{name}")

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.weights[name]
        return value.to(dtype) if value.is_floating_point() else value

    def arguments(self, node: fx.Node) -> tuple[list[Tensor], Callable]:
        """The stacked tensors among the node's arguments, and (args, kwargs) from such tensors."""
        nodes = [each for each in node.all_input_nodes if isinstance(self.values[each], Tensor)]

        def rebuild(given: list[Tensor]) -> tuple[tuple, dict]:
            own = dict(zip(nodes, given, strict=True))
            return fx.map_arg((node.args, node.kwargs), lambda each: own.get(each, self.values[each]))

        return [self.values[each] for each in nodes], rebuild


def _function(node: fx.Node) -> Callable[[_Call], Any]:
    """A traced function or method: as it is where the models count as more images, else through vmap."""
    target = node.target
    function = target if node.op == "call_function" else (lambda x, *a, **k: getattr(x, target)(*a, **k))
    name = getattr(target, "__name__", target)

    def run(call: _Call) -> Any:
        tensors, rebuild = call.arguments(node)
        args, kwargs = rebuild(tensors)
        if not tensors:
            return function(*args, **kwargs)
        if target in ("size", "dim") or target is getattr:  # of one model
            return function(args[0][0], *args[1:], **kwargs)
        if target in UNARY or (target in BINARY and len({each.ndim for each in tensors}) == 1):
            return function(*args, **kwargs)
        if name == "mean" and args[0].ndim == 5 and _pixels_only(args[1:], kwargs):
            return pixel_mean(args[0], bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False)))
        if name == "flatten" and (args[1:] == (1,) or (len(args) == 1 and kwargs == {"start_dim": 1})):
            return args[0].flatten(2)
        if target is operator.getitem and isinstance(args[1], tuple) and all(isinstance(i, slice) for i in args[1]):
            return args[0][(slice(None), *args[1])]
        return vmap(lambda given: _call(function, *rebuild(given)))(tensors)

    return run


def _call(function: Callable, args: tuple, kwargs: dict) -> Any:
    return function(*args, **kwargs)


def _pixels_only(args: tuple, kwargs: Mapping) -> bool:
    dims, known = args[0] if args else kwargs.get("dim"), set(kwargs) <= {"dim", "keepdim"}
    return known and isinstance(dims, tuple | list) and sorted(i % 4 for i in dims) == [2, 3]
