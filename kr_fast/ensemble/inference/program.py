"""M models as one program: the layers of the traced graph in order, bound to each model's weights.

On a CPU depth is fused and not models: a chunk of images that fits the cache goes through all layers of one model, and
then through those of the next. Every chunk has one shape (the last is padded) and runs in one thread, so the answer
for an image depends neither on its neighbours, nor on the other models, nor on the number of threads.
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble.graph.lowering import products, shape
from kr_fast.ensemble.graph.network import NetworkGraph
from kr_fast.ensemble.graph.precision import HALF
from kr_fast.ensemble.inference import layers as layer_binding
from kr_fast.ensemble.inference.chunks import chunk_size, keep_freed_memory, most_images, most_on_a_gpu
from kr_fast.ensemble.inference.runner import ArrayOptions, PerModelRunner
from kr_fast.ops.nn.reference import packed_shape
from kr_fast.runtime import memory


class Program(NetworkGraph, PerModelRunner):
    """``bind(m)(x)``: logits of model ``m`` for the chunk ``x`` ``[chunk, C, H, W]`` of ``input_dtype``, float32.

    Binding folds and packs the weights of a model. Beyond MOST_BOUND bytes in all every call binds anew, as many models
    at a time as BOUND_AT_ONCE holds (at least one), in about a tenth of their time.
    """

    parallel, padded = True, True

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, options: ArrayOptions, images: int):
        """As :class:`NetworkGraph`; the chunk is the best for about ``images`` images where the options have none."""
        super().__init__(models[0], sample, options.dtype, per_model=True)
        self.weight_bytes = self._weight_bytes(models[0])
        self.start(models, options, sample.device, self.weight_bytes)
        if sample.device.type == "cpu":
            keep_freed_memory()
            written, products = sum(map(self.bytes_of, self.nodes)), sum(self._products(models[0]))
            calls = len(self.nodes) - len(self.fixed)
            self.most = most_images(self.widest, written, self.weight_bytes, products, calls)
        else:
            self.most = most_on_a_gpu(self.widest)
        self.tiled = any(layer.winograd for layer in self.layers.values())
        self.input_dtype = torch.float32 if self.dtype in HALF else self.dtype
        self.fit(images)

    @property
    def recorded_chunk(self) -> int | None:
        """What was asked for: the bits of an answer do not follow from the chunk."""
        return self.options.chunk

    def fit(self, images: int) -> None:
        """As in :class:`Runner`; for the memory that is free."""
        free = memory.free_memory(self.device)
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        pieces = -(-2 * threads // self.together) if self.device.type == "cpu" else 1
        size = chunk_size(self.most, images, pieces, self.tiled)
        self.chunk = self.options.chunk or max(min(size, free // (self.bytes_per_image * threads or 1)), 1)

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
                taps = math.prod(each.stop - each.start for each in layer.taps)
                total -= weight[:, :, 0, 0].numel() * (weight[0, 0].numel() - taps) * self.dtype.itemsize
        computed = [node for node in self.fixed if node.op != "get_attr" and not self.fixed.issuperset(node.users)]
        return total + sum(math.prod(shape(node) or ()) * self.dtype.itemsize for node in computed)

    def make(self, m: int) -> Callable[[Tensor], Tensor]:
        """As in :class:`PerModelRunner`."""
        model = self.models[m]
        fixed: dict[fx.Node, object] = {}
        for node in self.nodes:
            if node in self.fixed:
                fixed[node] = self._step(node, model)(fixed, None)
        fixed = {node: value for node, value in fixed.items() if not self.fixed.issuperset(node.users)}
        steps = [(node, self._step(node, model), self.dead[node]) for node in self.nodes if node not in self.fixed]

        def run(x: Tensor) -> Tensor:
            values = dict(fixed)
            for node, step, dead in steps:
                values[node] = step(values, x)
                for each in dead:
                    del values[each]
            return values[self.output].float()

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
        run = self.function(node, model)
        if not node.kwargs and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            first = node.args[0]
            return lambda values, x: run(values[first])

        args, kwargs = [_reader(each) for each in node.args], {k: _reader(each) for k, each in node.kwargs.items()}

        def general(values: dict, x: Tensor) -> object:
            return run(*[read(values) for read in args], **{name: read(values) for name, read in kwargs.items()})

        return general


def _reader(argument: object) -> Callable[[dict], object]:
    """The argument of a call, from the values of the nodes before it."""
    if isinstance(argument, fx.Node):
        return operator.itemgetter(argument)
    named: list[fx.Node] = []
    fx.map_arg(argument, named.append)
    if named:
        return lambda values: fx.map_arg(argument, lambda each: values[each])
    return lambda values: argument
