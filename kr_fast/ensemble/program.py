"""M models as one program: the layers of the traced graph in order, bound to each model's weights.

On a CPU depth is fused and not models: a chunk of images that fits the cache goes through all layers of one model, and
then through those of the next. Every chunk has one shape (the last is padded) and runs in one thread, so the answer
for an image depends neither on its neighbours, nor on the other models, nor on the number of threads.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble import layers as layer_binding
from kr_fast.ensemble.lowering import lower, shape
from kr_fast.runtime.errors import fail

# Bytes of the widest layer's input and output in one chunk. On Zen 5 (1 MiB L2, 32 MiB L3) single convolutions of
# ResNet-20 and of an airbench-like network ran best with 2 to 8 MiB; less pays for calls, 32 MiB for memory. The GPU's
# figure is a guess that no GPU has measured.
CPU_BUDGET, GPU_BUDGET = 4 << 20, 512 << 20
CPU_MOST, GPU_MOST = 128, 4096  # images of a chunk: a small set is padded to it


class Program:
    """``program(m, x)``: logits of model ``m`` for the chunk ``x`` ``[chunk, C, H, W]``, float32."""

    parallel, padded = True, True

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype, chunk: int | None):
        """``sample``: two images ``[2, C, H, W]`` of the models' dtype. Raises lowering.Unsupported."""
        self.graph, self.layers = lower(models[0], sample)
        self.dtype, device = dtype, sample.device
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        self.classes = _classes(shape(self.output) if isinstance(self.output, fx.Node) else None)
        self.frees = _frees(self.nodes, self.output)
        size = torch.finfo(dtype).bits // 8
        budget, most = (CPU_BUDGET, CPU_MOST) if device.type == "cpu" else (GPU_BUDGET, GPU_MOST)
        self.bytes_per_image = self._live(size)
        self.chunk = chunk or max(1, min(most, 2 ** int(math.log2(max(budget // self._widest(size), 1)))))
        self.steps = [self._bind(model) for model in models]

    def __call__(self, m: int, x: Tensor) -> Tensor:
        values: dict[fx.Node, Tensor] = {}
        for node, run, frees in self.steps[m]:
            values[node] = run(values, x)
            for dead in frees:
                del values[dead]
        return values[self.output].float()

    def _elements(self, node: fx.Node) -> int:
        found = shape(node)
        return math.prod(found) // 2 if found else 0  # of the sample's two images

    def _widest(self, size: int) -> int:
        return max(size * (self._elements(n) + sum(map(self._elements, n.all_input_nodes))) for n in self.nodes) or 1

    def _live(self, size: int) -> int:
        live, most = 0, 0
        for node in self.nodes:
            live += size * self._elements(node) * (node.op != "get_attr")
            most = max(most, live)
            live -= sum(size * self._elements(dead) * (dead.op != "get_attr") for dead in self.frees[node])
        return most

    def _bind(self, model: nn.Module) -> list[tuple[fx.Node, Callable, list[fx.Node]]]:
        return [(node, self._step(node, model), self.frees[node]) for node in self.nodes]

    def _step(self, node: fx.Node, model: nn.Module) -> Callable:
        if node.op == "placeholder":
            return lambda values, x: x
        if node.op == "get_attr":
            value = _attribute(model, node.target)
            value = value.detach().to(self.dtype) if value.is_floating_point() else value
            return lambda values, x: value
        if node in self.layers:
            layer = self.layers[node]
            run = layer_binding.bind(layer, model, self.dtype, (self.chunk, *shape(node.args[0])[1:]))
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

    def _function(self, node: fx.Node, model: nn.Module) -> Callable:
        if node.op == "call_module":
            part = model.get_submodule(node.target)
            held = [*part.parameters(), *part.buffers()]
            if any(value.is_floating_point() and value.dtype != self.dtype for value in held):
                part = copy.deepcopy(part).to(self.dtype)
            return part
        if node.op == "call_method":
            name = node.target
            return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
        return node.target


class Eager:
    """Each model by its own forward: what cannot be traced, and BatchNorm on the statistics of the batch."""

    parallel = False

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, chunk: int, *, padded: bool, batch_norm: bool):
        self.models, self.chunk, self.padded, self.batch_norm = models, chunk, padded, batch_norm
        self.bytes_per_image = 0
        self.classes = _classes(getattr(self(0, sample), "shape", None))

    def __call__(self, m: int, x: Tensor) -> Tensor:
        model = self.models[m]
        if not self.batch_norm:
            return model(x).float()
        norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        try:
            for part in norms:
                part.forward = _batch_forward(part)
            return model(x).float()
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


def _attribute(model: nn.Module, path: str) -> Tensor:
    value = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
