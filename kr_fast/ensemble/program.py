"""M models as one program: the layers of the traced graph in order, bound to each model's weights.

On a CPU depth is fused and not models: a chunk of images that fits the cache goes through all layers of one model, and
then through those of the next. Every chunk has one shape (the last is padded) and runs in one thread, so the answer
for an image depends neither on its neighbours, nor on the other models, nor on the number of threads.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble import layers as layer_binding
from kr_fast.ensemble.lowering import lower, shape
from kr_fast.ensemble.networks import answer
from kr_fast.ensemble.precision import HALF, in_float32, insert_casts
from kr_fast.ops.winograd_conv2d import batch_size, packed_shape
from kr_fast.runtime.errors import fail

# Bytes of the widest layer's inputs and output in one chunk. On a CPU with 1 MiB of L2 a core ResNet-20 ran fastest
# with 32 images (6 MiB), 4 to 15 % faster than with 16 or 64. A network of many weights and few pixels takes more, so
# that a chunk reads no more bytes of weights than it writes of activations: 64 for an airbench-like one, 32 for
# ResNet-18, where 8 would take 26 and 16 % longer. The nearest numbers that fill Winograd's blocks of tiles, 84 and 42,
# are 2 to 5 % faster still, where the last chunk is not much larger than what is left for it. The GPU's figure is a
# guess that no GPU has measured.
CPU_BUDGET, GPU_BUDGET = 6 << 20, 512 << 20
CPU_MOST, GPU_MOST = 128, 4096  # images of a chunk: a small set is padded to it
KEPT = 16 << 20  # bytes of packed weights, all models together, that stay bound between calls


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep what activations free for the next ones.

    glibc gives memory back to the system when a few freed megabytes lie at the end of the heap, and takes its measure
    of "few" from the largest block of its own that was freed before. ResNet-20 then met 3,000 page faults a chunk, a
    third of its time. One block of nearly the largest size that counts, never touched, sets the measure.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class Graph:
    """The traced graph of the models' architecture, with the bytes that it needs.

    ``mixed``: in half precision the ends are computed in float32, see ``precision.py``, and 3x3 convolutions may run by
    Winograd's algorithm.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype, *, mixed: bool = False):
        """``sample``: two images ``[2, C, H, W]`` of the model's dtype. Raises lowering.Unsupported."""
        winograd = mixed and sample.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self.graph, self.layers = lower(model, sample, winograd=winograd)
        self.dtype, self.in_float32 = dtype, set()
        if mixed and dtype in HALF:
            self.in_float32 = in_float32(self.graph, self.layers, dict(self.graph.owning_module.named_modules()))
            insert_casts(self.graph, self.in_float32, dtype)
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        self.classes = _classes(shape(self.output) if isinstance(self.output, fx.Node) else None)
        self.frees = _frees(self.nodes, self.output)
        self.bytes_per_image, self.widest = self._live(), self._widest()

    def node_dtype(self, node: fx.Node) -> torch.dtype:
        """What the node is computed in."""
        return torch.float32 if node in self.in_float32 else self.dtype

    def _bytes(self, node: fx.Node) -> int:
        found = shape(node)  # of the sample's two images
        return math.prod(found) // 2 * self.node_dtype(node).itemsize if found and node.op != "get_attr" else 0

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
    call binds anew, in about a tenth of the time of a chunk, and as many models at a time as KEPT holds (at least one).
    """

    parallel, padded = True, True

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype, chunk: int | None, images: int):
        """As :class:`Graph`; for chunks of ``chunk`` images, or as many as are best for about ``images``."""
        super().__init__(models[0], sample, dtype, mixed=True)
        self.weight_bytes = self._weight_bytes(models[0])
        if sample.device.type == "cpu":
            _keep_freed_memory()
            written = sum(map(self._bytes, self.nodes)) or 1
            count, most = max(CPU_BUDGET // self.widest, self.weight_bytes // written), CPU_MOST
        else:
            count, most = GPU_BUDGET // self.widest, GPU_MOST
        count = min(most, 2 ** int(math.log2(max(count, 1))))
        tiled = any(layer.winograd for layer in self.layers.values())
        self.chunk = chunk or (batch_size(count, images) if tiled else count)
        self.models, self.input_dtype = models, torch.float32 if dtype in HALF else dtype
        self.keeps, self._bound = self.weight_bytes * len(models) <= KEPT, {}

    def _weight_bytes(self, model: nn.Module) -> int:
        """Of one model, bound."""
        total = sum(value.numel() for value in model.parameters()) * self.dtype.itemsize
        for layer in self.layers.values():
            if layer.winograd:
                part = model.get_submodule(layer.module)
                packed = 4 * math.prod(packed_shape(part.out_channels, part.in_channels))
                total += packed - part.weight.numel() * self.dtype.itemsize
        return total

    def bind(self, m: int) -> Callable[[Tensor], Tensor]:
        if m in self._bound:
            return self._bound[m]
        model = self.models[m]
        steps = [(node, self._step(node, model), self.frees[node]) for node in self.nodes]

        def run(x: Tensor) -> Tensor:
            values: dict[fx.Node, Tensor] = {}
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
            value = attribute(model, node.target)
            value = value.detach().to(dtype) if value.is_floating_point() else value
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

        def general(values: dict, x: Tensor) -> object:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: values[each])
            return run(*args, **kwargs)

        return general


class Eager:
    """Each model by its own forward: what cannot be traced, and BatchNorm on the statistics of the batch."""

    parallel = False

    def __init__(
        self,
        models: Sequence[nn.Module],
        sample: Tensor,
        dtype: torch.dtype,
        chunk: int,
        *,
        padded: bool,
        batch_norm: bool,
    ):
        self.models, self.input_dtype, self.chunk = models, dtype, chunk
        self.padded, self.batch_norm = padded, batch_norm
        held = [value for value in (*models[0].parameters(), *models[0].buffers()) if value.is_floating_point()]
        self.casts = any(value.dtype != dtype for value in held)
        self.weight_bytes = sum(value.numel() for value in held) * dtype.itemsize if self.casts else 0
        self.keeps, self._bound = self.weight_bytes * len(models) <= KEPT, {}
        self.bytes_per_image = 0
        self.classes = _classes(getattr(self.bind(0)(sample.to(dtype)), "shape", None))

    def bind(self, m: int) -> Callable[[Tensor], Tensor]:
        """As :meth:`Program.bind`; a copy of the model where it is of another dtype."""
        if m in self._bound:
            return self._bound[m]
        model = copy.deepcopy(self.models[m]).to(self.input_dtype) if self.casts else self.models[m]

        def run(x: Tensor) -> Tensor:
            return self._forward(model, x)

        if self.keeps:
            self._bound[m] = run
        return run

    def _forward(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self.batch_norm:
            return answer("ModelArray", "models", model, x).float()
        norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        try:
            for part in norms:
                part.forward = _batch_forward(part)
            return answer("ModelArray", "models", model, x).float()
        finally:
            for part in norms:
                part.__dict__.pop("forward", None)


def _batch_forward(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def _classes(found: Sequence[int] | None) -> int:
    if found is None or len(found) != 2 or found[1] < 2:
        fail("ModelArray", "models", "return logits [N, classes >= 2]", None if found is None else list(found))
    return found[1]


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


def attribute(model: nn.Module, path: str) -> Tensor:
    value = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
