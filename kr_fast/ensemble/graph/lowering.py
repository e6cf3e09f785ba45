"""From a module's forward to a short graph: traced once, BatchNorm folded, activations and residual sums fused.

The structure is common to all models; only the numbers differ. So the graph holds :class:`Layer` recipes (which
convolution, which BatchNorm goes into it, what follows it) and ``layers.py`` binds one to each model's weights. Nodes
that no rule knows stay as they were traced and run exactly as in the module.
"""

import dataclasses
import math
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from kr_fast.backends.cpu.nn import winograd_is_faster
from kr_fast.ensemble.graph import kinds
from kr_fast.ensemble.graph.kinds import Activation
from kr_fast.ensemble.graph.trace import Traced, Unsupported, keeps_forward, shapes, trace


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
    taps: tuple[slice, slice] | None = None  # of the filter: the others see the border of zeros alone


@dataclasses.dataclass
class Lowered:
    """A graph, its layers, and the tensors that the forward makes (see tracing.py)."""

    graph: fx.Graph
    layers: dict[fx.Node, Layer]
    constants: dict[str, torch.Tensor]


def lower(model: nn.Module, example: torch.Tensor, *, winograd: bool = False) -> Lowered:
    """The graph of ``model`` (in eval mode) for images like ``example``, and the recipes of its layers.

    ``winograd``: 3x3 convolutions that gain by it are marked as such, and take the pooling behind them.

    Raises: Unsupported.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise Unsupported(f"{name} has no running statistics")
    traced = trace(model)
    shapes(traced, example.clone(memory_format=torch.contiguous_format))  # a forward may write into its input
    builder = _Builder(traced)
    builder.simplify()
    builder.find_layers()
    builder.fuse()
    if winograd:
        builder.mark_winograd()
    if example.device.type == "cpu":
        builder.trim()
        builder.pool_averages()
    traced.graph.lint()
    return Lowered(traced.graph, builder.layers, traced.constants)


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The node's shape for the example, or None where it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def products(node: fx.Node, layer: Layer, part: nn.Module) -> int:
    """Multiplications of a convolution or linear layer by the definition, for the example's images; pixels that are
    pooled away are left out."""
    taps = part.weight.shape[2:] if layer.taps is None else [each.stop - each.start for each in layer.taps]
    return math.prod(shape(node)) * part.weight.shape[1] * math.prod(taps)


def _only_input(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


READING = {getattr, operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
MOST_POOLED = 4096  # pixels that avg_pool2d may add up one after the other in float32


class _Builder:
    def __init__(self, traced: Traced):
        self.graph, self.modules = traced.graph, dict(traced.model.named_modules(remove_duplicate=False))
        self.layers: dict[fx.Node, Layer] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def simplify(self) -> None:
        """Drop what does nothing in eval mode: Identity, Dropout, x[:, :, ::1, ::1], checks of shapes, and what only
        they read."""
        for node in list(self.graph.nodes):
            source = _only_input(node)
            if node.target is torch._assert and not node.users and (source is None or shape(source) is None):
                self.graph.erase_node(node)
            elif source is not None:
                full = node.target is operator.getitem and kinds.pixel_step(node) == (1, 1)
                if (full and shape(node) == shape(source)) or kinds.does_nothing(node, self.modules):
                    self.replace(node, source)
        for node in reversed(self.graph.nodes):
            if not node.users and node.target in READING:
                self.graph.erase_node(node)

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
        if keeps_forward(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d:
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
            source = _only_input(node)
            if source is None or node.op not in ("call_module", "call_function"):
                continue
            if (conv := kinds.convolution(node, self.modules)) and len(shape(node) or ()) == 4:
                name, stride, padding = conv
                self.layers[node] = Layer("conv", name, stride=stride, padding=padding)
                self.alone(node, source)
                self.merge_step(node, self.modules[name])
            elif name := kinds.linear(node, self.modules):
                self.layers[node] = Layer("linear", name)
                self.alone(node, source)
            elif name := kinds.batch_norm(node, self.modules):
                self.fold_norm(node, source, name)

    def alone(self, node: fx.Node, source: fx.Node) -> None:
        """The input is a layer's one argument: what a function takes beside it are the layer's weights."""
        weights = [each for each in node.all_input_nodes if each is not source]
        node.args, node.kwargs = (source,), {}
        for each in weights:
            if not each.users:
                self.graph.erase_node(each)

    def merge_step(self, node: fx.Node, module: nn.Conv2d) -> None:
        """A 1x1 convolution of every other pixel is a strided one."""
        source = node.args[0]
        step = kinds.pixel_step(source)
        if step and len(source.users) == 1 and module.kernel_size == (1, 1) and self.layers[node].padding == (0, 0):
            stride = self.layers[node].stride
            self.layers[node].stride = (stride[0] * step[0], stride[1] * step[1])
            node.args = (source.args[0],)
            self.graph.erase_node(source)

    def fold_norm(self, node: fx.Node, source: fx.Node, name: str) -> None:
        layer, dims = self.layers.get(source), len(shape(node) or ())
        folds = layer and layer.kind != "affine" and layer.norm is None and len(source.users) == 1
        if folds and dims == (4 if layer.kind == "conv" else 2):
            layer.norm = name
            self.alone(node, source)
            self.replace(node, source)
        elif dims in (2, 4):
            self.layers[node] = Layer("affine", name)
            self.alone(node, source)

    def trim(self) -> None:
        """Leave out the taps of a filter that see the border alone, as all but one of 3x3 do on a single pixel.

        Raises: Unsupported where all taps do: oneDNN ends the process there if channels lie last.
        """
        for node, layer in self.layers.items():
            before, after = shape(node.args[0]), shape(node)
            if layer.kind != "conv" or layer.winograd or not before or not after:
                continue
            conv = self.modules[layer.module]
            per_axis = (before[2:], after[2:], conv.kernel_size, layer.stride, layer.padding, conv.dilation)
            sizes = list(zip(*per_axis, strict=True))
            seen = [_seen(*size) for size in sizes]
            if not all(seen):
                raise Unsupported(f"{layer.module} sees no pixel")
            axes = [_trimmed(taps, *size) for taps, size in zip(seen, sizes, strict=True)]
            if any(taps != slice(0, k) for (taps, _), k in zip(axes, conv.kernel_size, strict=True)):
                layer.taps, layer.padding = tuple(taps for taps, _ in axes), tuple(padding for _, padding in axes)

    def fuse(self) -> None:
        for node in list(self.layers):
            self.fuse_activation(node)
        for node in list(self.layers):
            self.fuse_add(node)
        for node in self.graph.nodes:
            self.stand_alone(node)

    def stand_alone(self, node: fx.Node) -> None:
        activation, source = kinds.activation(node, self.modules), _only_input(node)
        if activation and source is not None and len(source.users) == 1 and node not in self.layers:
            self.layers[node] = Layer("activation", "", activation=activation)

    def fuse_activation(self, node: fx.Node) -> None:
        layer, user = self.layers[node], kinds.only_user(node)
        activation = None if user is None or layer.activation else kinds.activation(user, self.modules)
        if activation:
            layer.activation = activation
            self.replace(user, node)

    def fuse_add(self, node: fx.Node) -> None:
        """conv + other, and the ReLU behind the sum: the convolution moves to where the sum stood."""
        layer, total = self.layers[node], kinds.only_user(node)
        if layer.kind != "conv" or layer.add or layer.activation or total is None:
            return
        if not kinds.is_sum(total) or not all(isinstance(arg, fx.Node) for arg in total.args):
            return
        if total.args[0] is total.args[1]:
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
        user = kinds.only_user(moved)
        if user is not None and kinds.activation(user, self.modules) == kinds.RELU:
            self.layers[moved].activation = kinds.RELU
            self.replace(user, moved)
        self.layers[moved].in_place = self.is_last_use(other, moved)

    def mark_winograd(self) -> None:
        for node, layer in list(self.layers.items()):
            if layer.kind == "conv" and winograd_is_faster(
                self.modules[layer.module], layer.stride, layer.padding, shape(node.args[0])[2:]
            ):
                layer.winograd, layer.in_place = True, False
                self.fuse_pool(node)

    def fuse_pool(self, node: fx.Node) -> None:
        """The 2x2 maximum behind a convolution (a ReLU between them may as well follow), and what follows that."""
        layer, pool = self.layers[node], kinds.only_user(node)
        plain = not layer.add and layer.activation in (None, kinds.RELU)
        if pool is None or not plain or not kinds.is_pool_of_pairs(self.module(pool), shape(node)):
            return
        layer.pool = True
        node.meta["tensor_meta"] = pool.meta["tensor_meta"]
        self.replace(pool, node)
        after = kinds.only_user(node)
        following = self.layers.get(after)
        if layer.activation or following is None:
            return
        if following.kind == "affine":
            layer.pool_norm = following.module
        elif following.kind != "activation":
            return
        layer.activation = following.activation
        del self.layers[after]
        self.replace(after, node)

    def makes_memory(self, node: fx.Node) -> bool:
        """Whether the node's result is no view of what it reads, which it leaves as it is."""
        return node in self.layers or isinstance(self.module(node), kinds.POOLS)

    def unread_until(self, node: fx.Node, end: fx.Node) -> bool:
        """Nothing between ``node`` and ``end`` may write into ``node``'s input, so that it can be computed later."""
        order = {each: position for position, each in enumerate(self.graph.nodes)}
        return all(
            self.makes_memory(user) or user.target is operator.getitem
            for user in node.args[0].users
            if order[node] < order[user] < order[end]
        )

    def is_last_use(self, node: fx.Node, at: fx.Node) -> bool:
        """``node`` is memory of its own, no view of it exists, and nobody reads it after ``at``."""
        if not self.makes_memory(node) or at.args[0] is node:
            return False
        order = {each: position for position, each in enumerate(self.graph.nodes)}
        return all(user is at or (order[user] < order[at] and self.makes_memory(user)) for user in node.users)


def _seen(before: int, after: int, taps: int, stride: int, padding: int, step: int) -> list[int]:
    """Along one axis, the taps of a filter that see a pixel at any position."""
    pixels = range(after)
    return [t for t in range(taps) if any(0 <= pixel * stride - padding + t * step < before for pixel in pixels)]


def _trimmed(seen: list[int], before: int, after: int, taps: int, stride: int, padding: int, step: int):
    """The taps to keep and the padding for them: those that are seen, unless they need more zeros on one side."""
    first, last = seen[0], seen[-1]
    left = padding - first * step
    fits = left >= 0 and (before + 2 * left - step * (last - first) - 1) // stride + 1 == after
    return (slice(first, last + 1), left) if fits else (slice(0, taps), padding)
