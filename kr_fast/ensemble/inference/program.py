"""M models as one program: the layers of the traced graph in order, bound to each model's weights.

On a CPU depth is fused and not models: a chunk of images that fits the cache goes through all layers of one model, and
then through those of the next. Every chunk has one shape (the last is padded) and runs in one thread, so the answer
for an image depends neither on its neighbours, nor on the other models, nor on the number of threads.
"""

import copy
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble.graph.lowering import lower, products, shape
from kr_fast.ensemble.graph.precision import HALF, in_float32, insert_casts
from kr_fast.ensemble.graph.tracing import Unsupported, attribute
from kr_fast.ensemble.inference import layers as layer_binding
from kr_fast.ensemble.inference.chunks import chunk_size, keep_freed_memory, most_images, most_on_a_gpu
from kr_fast.ops.nn.winograd_conv2d import packed_shape
from kr_fast.runtime.memory import free_memory

# Bytes of packed weights: of all models together, that stay bound between calls, and of models bound at a time where
# they are more.
KEPT, TOGETHER = 256 << 20, 64 << 20
WRITING = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


class Graph:
    """The traced graph of the models' architecture, with the bytes that it needs.

    ``mixed``: in half precision the ends are computed in float32, see ``precision.py``, and 3x3 convolutions may run by
    Winograd's algorithm.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype, *, mixed: bool = False):
        """``sample``: two images ``[2, C, H, W]`` of the model's dtype. Raises lowering.Unsupported."""
        winograd = mixed and sample.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        lowered = lower(model, sample, winograd=winograd)
        self.graph, self.layers, self.constants = lowered.graph, lowered.layers, lowered.constants
        self.dtype, self.in_float32 = dtype, set()
        if mixed and dtype in HALF:
            modules = dict(model.named_modules(remove_duplicate=False))
            self.in_float32 = in_float32(self.graph, self.layers, modules)
            insert_casts(self.graph, self.in_float32, dtype)
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        found = shape(self.output) if isinstance(self.output, fx.Node) else None
        if found is None or len(found) != 2:
            raise Unsupported("its trace does not end in logits")
        self.classes = found[1]
        self.frees = _frees(self.nodes, self.output)
        self.fixed = _fixed(self.nodes, model)
        self.bytes_per_image, self.widest = self._live(), self._widest()

    def node_dtype(self, node: fx.Node) -> torch.dtype:
        """What the node is computed in."""
        return torch.float32 if node in self.in_float32 else self.dtype

    def _bytes(self, node: fx.Node) -> int:
        found = shape(node)  # of the sample's two images
        return math.prod(found) // 2 * self.node_dtype(node).itemsize if found and node not in self.fixed else 0

    def _widest(self) -> int:
        return max(self._bytes(n) + sum(map(self._bytes, n.all_input_nodes)) for n in self.nodes) or 1

    def _live(self) -> int:
        live, most = 0, 0
        for node in self.nodes:
            layer = self.layers.get(node)
            taken = node.args[1] if layer and layer.in_place else None  # the sum lies in the other term's memory
            live += 0 if taken else self._bytes(node)
            most = max(most, live)
            live -= sum(self._bytes(dead) for dead in self.frees[node] if dead is not taken)
        return most

    def tensor(self, model: nn.Module, node: fx.Node, dtype: torch.dtype) -> object:
        """What a get_attr node names in ``model``; numbers in ``dtype``."""
        own = self.constants.get(node.target)
        value = attribute(model, node.target) if own is None else own
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.to(dtype) if value.is_floating_point() else value

    def _cast(self, part: nn.Module, dtype: torch.dtype) -> nn.Module:
        held = [*part.parameters(), *part.buffers()]
        if any(value.is_floating_point() and value.dtype != dtype for value in held):
            part = copy.deepcopy(part).to(dtype)
        return part

    def _function(self, node: fx.Node, model: nn.Module) -> Callable:
        if node.op == "call_module":
            return self._cast(model.get_submodule(node.target), self.node_dtype(node))
        if node.op == "call_method":
            name = node.target
            return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
        return node.target


class Program(Graph):
    """``bind(m)(x)``: logits of model ``m`` for the chunk ``x`` ``[chunk, C, H, W]`` of ``input_dtype``, float32.

    Binding folds and packs the weights of a model. Up to KEPT bytes in all, what is bound is kept; beyond that every
    call binds anew, as many models at a time as TOGETHER holds (at least one), in about a tenth of their time.
    """

    parallel, padded = True, True

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype, chunk: int | None, images: int):
        """As :class:`Graph`; for chunks of ``chunk`` images, or as many as are best for about ``images``."""
        super().__init__(models[0], sample, dtype, mixed=True)
        self.weight_bytes = self._weight_bytes(models[0])
        if sample.device.type == "cpu":
            keep_freed_memory()
            written, products = sum(map(self._bytes, self.nodes)), sum(self._products(models[0]))
            calls = len(self.nodes) - len(self.fixed)
            self.most = most_images(self.widest, written, self.weight_bytes, products, calls)
        else:
            self.most = most_on_a_gpu(self.widest)
        self.tiled = any(layer.winograd for layer in self.layers.values())
        self.models, self.input_dtype = models, torch.float32 if dtype in HALF else dtype
        self.keeps, self.together = kept(self.weight_bytes, len(models))
        self._bound: dict[int, Callable] = {}
        self._chunk, self.device = chunk, sample.device
        self.fit(images, free_memory(self.device))

    def fit(self, images: int, free: int) -> None:
        """Choose a chunk for ``images`` images and ``free`` bytes. The bits of their answers do not depend on it."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        pieces = -(-2 * threads // self.together) if self.device.type == "cpu" else 1
        size = chunk_size(self.most, images, pieces, self.tiled)
        self.chunk = self._chunk or max(min(size, free // (self.bytes_per_image * threads or 1)), 1)

    def _products(self, model: nn.Module) -> list[int]:
        """Multiplications of each layer for an image, by the definition."""
        return [
            products(node, layer, model.get_submodule(layer.module)) // 2  # of the sample's two images
            for node, layer in self.layers.items()
            if layer.kind in ("conv", "linear")
        ]

    def _weight_bytes(self, model: nn.Module) -> int:
        """Of one model, bound."""
        total = sum(value.numel() for value in model.parameters()) * self.dtype.itemsize
        for layer in self.layers.values():
            if layer.kind not in ("conv", "linear"):
                continue
            weight = model.get_submodule(layer.module).weight
            if layer.winograd:
                total += 4 * math.prod(packed_shape(*weight.shape[:2])) - weight.numel() * self.dtype.itemsize
            elif layer.taps:
                kept = math.prod(taps.stop - taps.start for taps in layer.taps)
                total -= weight[:, :, 0, 0].numel() * (weight[0, 0].numel() - kept) * self.dtype.itemsize
        computed = [node for node in self.fixed if node.op != "get_attr" and not self.fixed.issuperset(node.users)]
        return total + sum(math.prod(shape(node) or ()) * self.dtype.itemsize for node in computed)

    def bind(self, m: int) -> Callable[[Tensor], Tensor]:
        if m in self._bound:
            return self._bound[m]
        model = self.models[m]
        held: dict[fx.Node, object] = {}
        for node in self.nodes:
            if node in self.fixed:
                held[node] = self._step(node, model)(held, None)
        held = {node: value for node, value in held.items() if not self.fixed.issuperset(node.users)}
        steps = [(node, self._step(node, model), self.frees[node]) for node in self.nodes if node not in self.fixed]

        def run(x: Tensor) -> Tensor:
            values = dict(held)
            for node, step, frees in steps:
                values[node] = step(values, x)
                for dead in frees:
                    del values[dead]
            return values[self.output].float()

        if self.keeps:
            self._bound[m] = run
        return run

    def _step(self, node: fx.Node, model: nn.Module) -> Callable:
        dtype = self.node_dtype(node)
        if node.op == "placeholder":
            return lambda values, x: x
        if node.op == "get_attr":
            value = self.tensor(model, node, dtype)
            return lambda values, x: value
        if node in self.layers:
            layer = self.layers[node]
            run = layer_binding.bind(layer, model, dtype, (self.chunk, *shape(node.args[0])[1:]))
            if layer.add:
                first, other = node.args
                return lambda values, x: run(values[first], values[other])
            first = node.args[0]
            return lambda values, x: run(values[first])
        run = self._function(node, model)
        if not node.kwargs and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            first = node.args[0]
            return lambda values, x: run(values[first])

        args, kwargs = [_reader(each) for each in node.args], {k: _reader(each) for k, each in node.kwargs.items()}

        def general(values: dict, x: Tensor) -> object:
            return run(*[read(values) for read in args], **{name: read(values) for name, read in kwargs.items()})

        return general


def kept(weight_bytes: int, models: int) -> tuple[bool, int]:
    """Whether models that take ``weight_bytes`` each stay bound, and how many are bound at a time."""
    keeps = weight_bytes * models <= KEPT
    return keeps, models if keeps else max(TOGETHER // weight_bytes, 1)


def _reader(argument: object) -> Callable[[dict], object]:
    """The argument of a call, from the values of the nodes before it."""
    if isinstance(argument, fx.Node):
        return operator.itemgetter(argument)
    named: list[fx.Node] = []
    fx.map_arg(argument, named.append)
    if named:
        return lambda values: fx.map_arg(argument, lambda each: values[each])
    return lambda values: argument


def _fixed(nodes: Sequence[fx.Node], model: nn.Module) -> set[fx.Node]:
    """Nodes that follow from weights alone: the same for all images, unless one is written into."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    for node in nodes:
        into = node.kwargs.get("out", node.args[0] if node.args else None) if _writes(node, model) else None
        while isinstance(into, fx.Node):
            if into in found:  # it, or what it may be a view of
                return {each for each in found if each.op == "get_attr"}
            into = into.args[0] if into.args and into.op != "call_module" else None
    return found


def _writes(node: fx.Node, model: nn.Module) -> bool:
    """Whether the node may write into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(node.target), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in WRITING or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _frees(nodes: list[fx.Node], output: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """After each node, the values that nobody reads any more."""
    last = {}
    for node in nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    last.pop(output, None)
    frees: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for source, node in last.items():
        frees[node].append(source)
    return frees
