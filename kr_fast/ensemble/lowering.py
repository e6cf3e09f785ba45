"""From a module's forward to a short graph: traced once, BatchNorm folded, activations and residual sums fused.

The structure is common to all models; only the numbers differ. So the graph holds :class:`Layer` recipes (which
convolution, which BatchNorm goes into it, what follows it) and ``layers.py`` binds one to each model's weights. Nodes
that no rule knows stay as they were traced and run exactly as in the module.
"""

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from kr_fast.ops.winograd_conv2d import gains

# (attribute of oneDNN's epilogue, scalars, algorithm)
Activation = tuple[str, tuple[float, ...], str]


@dataclasses.dataclass
class Layer:
    """A convolution ("conv") or linear layer ("linear") with what is fused into it; a BatchNorm ("affine") or an
    activation ("activation") that stands alone."""

    kind: str
    module: str
    norm: str | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    activation: Activation | None = None
    add: bool = False  # y = act(conv(x) + other)
    in_place: bool = False  # other's memory takes y
    winograd: bool = False  # by kr_fast.winograd_conv2d
    pool: bool = False  # the largest of 2x2 pixels is taken before ``pool_norm`` and the activation
    pool_norm: str | None = None  # a BatchNorm behind the pooling


class Unsupported(Exception):
    """The module cannot be traced, or not folded; the message says why."""


def lower(model: nn.Module, example: torch.Tensor, *, winograd: bool = False) -> tuple[fx.Graph, dict[fx.Node, Layer]]:
    """The graph of ``model`` (in eval mode) for images like ``example``, and the recipes of its layers.

    ``winograd``: 3x3 convolutions that gain by it are marked as such, and take the pooling behind them.

    Raises: Unsupported.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is None:
            raise Unsupported(f"{name} has no running statistics")
        if part._forward_hooks or part._forward_pre_hooks:
            raise Unsupported(f"{name or 'the model'} has forward hooks")
    try:
        traced = fx.symbolic_trace(model)
        ShapeProp(traced).propagate(example)
    except Exception as error:  # whatever a module's own code may raise when it meets a proxy
        raise Unsupported(f"torch.fx cannot trace it ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    builder = _Builder(traced)
    builder.simplify()
    builder.find_layers()
    builder.fuse()
    if winograd:
        builder.mark_winograd()
    if example.device.type == "cpu":
        builder.pool_averages()
    traced.graph.lint()
    return traced.graph, builder.layers


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The node's shape for the example, or None where it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def _only_input(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


ADDS = (operator.add, operator.iadd, torch.add)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MOST_POOLED = 4096  # pixels that avg_pool2d may add up one after the other in float32


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


class _Builder:
    def __init__(self, traced: fx.GraphModule):
        self.graph, self.modules = traced.graph, dict(traced.named_modules())
        self.layers: dict[fx.Node, Layer] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def simplify(self) -> None:
        """Drop what does nothing in eval mode: Identity, Dropout, x[:, :, ::1, ::1]."""
        nothing = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
        for node in list(self.graph.nodes):
            source = _only_input(node)
            if source is None:
                continue
            full = node.target is operator.getitem and pixel_step(node) == (1, 1) and shape(node) == shape(source)
            if type(self.module(node)) in nothing or full:
                self.replace(node, source)

    def pool_averages(self) -> None:
        """Averages over all pixels by avg_pool2d, whose sums have one order for any batch."""
        for node in list(self.graph.nodes):
            source = _only_input(node)
            before, after = shape(source) if source is not None else None, shape(node)
            if not before or len(before) != 4 or not self.is_average(node) or before[2] * before[3] > MOST_POOLED:
                continue
            with self.graph.inserting_before(node):
                pooled = self.graph.call_function(F.avg_pool2d, (source, before[2:]))
                flat = pooled if len(after) == 4 else self.graph.call_function(torch.flatten, (pooled, 1))
            meta = node.meta["tensor_meta"]
            flat.meta["tensor_meta"] = meta
            pooled.meta["tensor_meta"] = meta._replace(shape=torch.Size((*before[:2], 1, 1)))
            self.replace(node, flat)

    def is_average(self, node: fx.Node) -> bool:
        module = self.module(node)
        if type(module) is nn.AdaptiveAvgPool2d or node.target is F.adaptive_avg_pool2d:
            return shape(node)[2:] == (1, 1)
        if not (node.op == "call_method" and node.target == "mean") and node.target is not torch.mean:
            return False
        options = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        dims = options.get("dim")
        return (
            options.keys() <= {"dim", "keepdim"} and isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3}
        )

    def find_layers(self) -> None:
        for node in list(self.graph.nodes):
            module, source = self.module(node), _only_input(node)
            padding = _padding(module) if type(module) is nn.Conv2d else None
            if padding is not None:
                self.layers[node] = Layer("conv", node.target, stride=module.stride, padding=padding)
                self.merge_step(node, module)
            elif type(module) is nn.Linear:
                self.layers[node] = Layer("linear", node.target)
            elif type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and source is not None:
                self.fold_norm(node, source)

    def merge_step(self, node: fx.Node, module: nn.Conv2d) -> None:
        """A 1x1 convolution of every other pixel is a strided one."""
        source = node.args[0]
        step = pixel_step(source)
        if step and len(source.users) == 1 and module.kernel_size == (1, 1) and self.layers[node].padding == (0, 0):
            self.layers[node].stride = (module.stride[0] * step[0], module.stride[1] * step[1])
            node.args = (source.args[0],)
            self.graph.erase_node(source)

    def fold_norm(self, node: fx.Node, source: fx.Node) -> None:
        layer = self.layers.get(source)
        wanted = nn.BatchNorm2d if layer and layer.kind == "conv" else nn.BatchNorm1d
        flat = len(shape(source) or ()) == (4 if wanted is nn.BatchNorm2d else 2)
        folds = layer and layer.kind != "affine" and layer.norm is None and len(source.users) == 1 and flat
        if folds and type(self.module(node)) is wanted:
            layer.norm = node.target
            self.replace(node, source)
        elif len(shape(node) or ()) in (2, 4):
            self.layers[node] = Layer("affine", node.target)

    def fuse(self) -> None:
        for node in list(self.layers):
            self.fuse_activation(node)
        for node in list(self.layers):
            self.fuse_add(node)
        for node in self.graph.nodes:
            self.stand_alone(node)

    def stand_alone(self, node: fx.Node) -> None:
        found, source = self.activation(node), _only_input(node)
        if found and source is not None and len(source.users) == 1 and node not in self.layers:
            self.layers[node] = Layer("activation", "", activation=found)

    def follower(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def fuse_activation(self, node: fx.Node) -> None:
        layer, user = self.layers[node], self.follower(node)
        found = None if user is None or layer.activation else self.activation(user)
        if found:
            layer.activation = found
            self.replace(user, node)

    def activation(self, node: fx.Node) -> Activation | None:
        module = self.module(node)
        if module is not None:
            return _module_activation(module)
        kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if len(node.args) > 1:
            return None
        if node.op == "call_method":
            return None if kwargs else _METHODS.get(node.target)
        if node.target is F.gelu and set(kwargs) <= {"approximate"}:
            return ("gelu", (), kwargs.get("approximate", "none"))
        return None if kwargs or node.op != "call_function" else _FUNCTIONS.get(node.target)

    def fuse_add(self, node: fx.Node) -> None:
        """conv + other, and the ReLU behind the sum: the convolution moves to where the sum stood."""
        layer, total = self.layers[node], self.follower(node)
        if layer.kind != "conv" or layer.add or layer.activation or total is None:
            return
        is_add = total.target in ADDS if total.op == "call_function" else total.target in ("add", "add_")
        is_add = is_add and total.op in ("call_function", "call_method") and len(total.args) == 2 and not total.kwargs
        if not is_add or not all(isinstance(arg, fx.Node) for arg in total.args) or total.args[0] is total.args[1]:
            return
        other = total.args[1] if total.args[0] is node else total.args[0]
        if (
            not self.unread_until(node, total)
            or shape(other) != shape(node)
            or other.meta["tensor_meta"].dtype != node.meta["tensor_meta"].dtype
        ):
            return
        with self.graph.inserting_before(total):
            moved = self.graph.node_copy(node)
        moved.args = (*node.args, other)
        self.layers[moved] = dataclasses.replace(layer, add=True)
        self.replace(total, moved)
        self.graph.erase_node(node)
        del self.layers[node]
        user = self.follower(moved)
        if user is not None and (self.activation(user) or ("",))[0] == "relu":
            self.layers[moved].activation = ("relu", (), "")
            self.replace(user, moved)
        self.layers[moved].in_place = self.dies_here(other, moved)

    def mark_winograd(self) -> None:
        for node, layer in list(self.layers.items()):
            if layer.kind == "conv" and gains(self.modules[layer.module], layer.stride, layer.padding):
                layer.winograd, layer.in_place = True, False
                self.fuse_pool(node)

    def fuse_pool(self, node: fx.Node) -> None:
        """The 2x2 maximum behind a convolution (a ReLU between them may as well follow), and what follows that."""
        layer, pool = self.layers[node], self.follower(node)
        plain = not layer.add and (layer.activation or ("relu",))[0] == "relu"
        if pool is None or not plain or not _is_pool(self.module(pool), shape(node)):
            return
        layer.pool = True
        node.meta["tensor_meta"] = pool.meta["tensor_meta"]
        self.replace(pool, node)
        after = self.follower(node)
        found = self.layers.get(after)
        if layer.activation or found is None:
            return
        if found.kind == "affine":
            layer.pool_norm = found.module
        elif found.kind != "activation":
            return
        layer.activation = found.activation
        del self.layers[after]
        self.replace(after, node)

    def unread_until(self, node: fx.Node, place: fx.Node) -> bool:
        """Nothing between ``node`` and ``place`` may write into ``node``'s input, so that it can be computed later."""
        order = {each: number for number, each in enumerate(self.graph.nodes)}
        return all(
            user in self.layers or isinstance(self.module(user), POOLS) or user.target is operator.getitem
            for user in node.args[0].users
            if order[node] < order[user] < order[place]
        )

    def dies_here(self, node: fx.Node, at: fx.Node) -> bool:
        """``node`` is memory of its own, no view of it exists, and nobody reads it after ``at``."""
        if not (node in self.layers or isinstance(self.module(node), POOLS)):
            return False
        if at.args[0] is node:
            return False
        order = {each: place for place, each in enumerate(self.graph.nodes)}
        return all(
            user is at or (order[user] < order[at] and (user in self.layers or isinstance(self.module(user), POOLS)))
            for user in node.users
        )


def _is_pool(module: nn.Module | None, before: tuple[int, ...]) -> bool:
    if type(module) is not nn.MaxPool2d or min(before[2:]) < 2 or module.ceil_mode or module.return_indices:
        return False
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.stride)]
    return pairs == [(2, 2), (2, 2)] and module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))


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


_RELU: Activation = ("relu", (), "")
_METHODS = {"relu": _RELU, "relu_": _RELU, "sigmoid": ("sigmoid", (), ""), "tanh": ("tanh", (), "")}
_FUNCTIONS = {
    F.relu: _RELU,
    torch.relu: _RELU,
    F.relu6: ("hardtanh", (0.0, 6.0), ""),
    F.silu: ("swish", (), ""),
    F.hardswish: ("hardswish", (), ""),
    torch.sigmoid: ("sigmoid", (), ""),
    torch.tanh: ("tanh", (), ""),
}


def _module_activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind is nn.GELU:
        return ("gelu", (), module.approximate)
    if kind is nn.LeakyReLU:
        return ("leaky_relu", (module.negative_slope,), "")
    if kind is nn.ReLU6:
        return ("hardtanh", (0.0, 6.0), "")
    names = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
    return (names[kind], (), "") if kind in names else None
