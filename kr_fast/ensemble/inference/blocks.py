"""A block of models as one program for a GPU: each layer of the traced graph once, for all of them.

A chunk of images goes through all layers before the next one, so that what lies between two layers stays in the L2
cache. Layers with weights run in kernels that know of models, what has none runs on all models as on a larger batch,
and what has weights but no such kernel runs model by model. The bits of an answer depend on the kernels, which the
program names, on the chunk where a library's kernel is among them, and on nothing else.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble.graph.lowering import shape
from kr_fast.ensemble.graph.tracing import Unsupported
from kr_fast.ensemble.inference import residual_blocks
from kr_fast.ensemble.inference.block_layers import BoundLayer, Pixels
from kr_fast.ensemble.inference.layers import bind
from kr_fast.ensemble.inference.program import Graph
from kr_fast.ensemble.networks import own_words
from kr_fast.ops.batched.model_conv2d import View
from kr_fast.runtime.log import logger


class Each(list):
    """A value that differs from model to model and has no images: one for each model."""


class Batched(Graph):
    """``program.run(block, images, view)``: logits ``[G, B, K]`` of the models of ``block``."""

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype):
        """``sample``: two images of the models' dtype. Raises Unsupported."""
        super().__init__(models[0], sample, dtype)
        self.models, self.device = models, sample.device
        self.bound: dict[fx.Node, BoundLayer] = {}
        self.kernels: dict[str, str] = {}  # layer -> kernel
        self.singly: list[str] = []
        self.of_images = _of_images(self.nodes)
        steps = {node: self._step(node) for node in self.nodes}
        self.blocks = residual_blocks.find(self.bound, dtype, self.device)
        for node, whole in self.blocks.items():
            for part in whole.nodes:
                steps[part] = self._or_whole(part, steps[part], whole if part is node else None)
        self.steps = [(node, steps[node], self.frees[node]) for node in self.nodes]
        if self.singly:
            names = ", ".join(sorted(set(self.singly)))
            logger.warning("ModelArray: no kernel for all models at once, so these run model by model: %s", names)

    def _live(self) -> int:
        for layer in self.layers.values():
            layer.in_place = False  # the kernels here write into memory of their own
        return super()._live()

    def run(self, block: slice, images: Tensor, view: View) -> Tensor:
        """uint8 ``[B, H, W, C]`` -> float32 logits ``[G, B, K]``."""
        values: dict[fx.Node, object] = {}
        chunk = Pixels(images, view)
        for node, step, frees in self.steps:
            values[node] = step(values, block, chunk)
            for dead in frees:
                del values[dead]
        found = values[self.output]
        if found.shape != ((block.stop - block.start) * len(images), self.classes):
            raise Unsupported(f"a step takes models for images: its logits are {list(found.shape)}")
        return found.view(block.stop - block.start, len(images), -1).float()

    def try_run(self, block: slice, images: Tensor, view: View) -> Tensor:
        """As ``run``; where a step cannot take several models at once, that is Unsupported."""
        try:
            return self.run(block, images, view)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Unsupported(f"a step cannot take several models ({own_words(error)})") from None

    def only(self, kernels: dict[str, str]) -> dict[str, str]:
        """``kernels`` where this program has them, and else what is expected best."""
        found = {}
        for node, bound in self.bound.items():
            names, name = bound.kernels(node.args[0].op == "placeholder"), bound.layer.module
            found[name] = kernels[name] if kernels.get(name) in names else names[0]
        for whole in self.blocks.values():
            if all(kernels.get(name) == residual_blocks.KERNEL for name in whole.names):
                found |= dict.fromkeys(whole.names, residual_blocks.KERNEL)
        return found

    def _step(self, node: fx.Node) -> Callable:
        if node.op == "placeholder":
            return lambda values, block, chunk: chunk
        if node in self.layers:
            return self._layer(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            parts = [model.get_submodule(node.target) for model in self.models]
            if [*parts[0].parameters(), *parts[0].buffers()]:
                self.singly.append(type(parts[0]).__name__)
                parts = [self._cast(part, self.dtype) for part in parts]
                return self._one_by_one(node, lambda m: parts[m])
            return self._at_once(node, parts[0])
        call = self._function(node, self.models[0])
        return self._at_once(node, call)

    def _layer(self, node: fx.Node) -> Callable:
        layer = self.layers[node]
        if layer.kind == "activation":
            run = bind(layer, self.models[0], self.dtype, ())
            return self._at_once(node, lambda x, **options: run(x))  # options say what ``layer`` knows, or "inplace"
        bound = BoundLayer(layer, self.models, self.dtype, len(shape(node.args[0])) == 4)
        self.bound[node] = bound
        first_layer = node.args[0].op == "placeholder"
        self.kernels[layer.module] = bound.kernels(first_layer)[0]
        source, other = node.args[0], node.args[1] if layer.add else None

        def step(values, block, chunk):
            x = values[source]
            if isinstance(x, Pixels) and (not bound.spatial or layer.kind == "linear"):
                x = x.spread(block.stop - block.start, self.dtype)
            residual = None if other is None else self._plain(values[other], block)
            return bound.run(block, self.kernels[layer.module], x, residual)

        return step

    def _or_whole(self, node: fx.Node, step: Callable, whole: residual_blocks.BoundBlock | None) -> Callable:
        """``step``, or where blocks run as one: ``whole``, and nothing for the layers before its last."""
        name = self.layers[node].module

        def either(values, block, chunk):
            if self.kernels[name] != residual_blocks.KERNEL:
                return step(values, block, chunk)
            return None if whole is None else whole.run(block, values[whole.source])

        return either

    def _attribute(self, node: fx.Node) -> Callable:
        found = [self.tensor(model, node, self.dtype) for model in self.models]
        if isinstance(found[0], Tensor) and all(torch.equal(each, found[0]) for each in found):
            return lambda values, block, chunk: found[0]
        return lambda values, block, chunk: Each(found[block])

    def _plain(self, value: object, block: slice) -> object:
        return value.spread(block.stop - block.start, self.dtype) if isinstance(value, Pixels) else value

    def _at_once(self, node: fx.Node, call: Callable) -> Callable:
        """As on a larger batch, unless an argument differs from model to model."""
        singly = self._one_by_one(node, lambda m: call)

        def step(values, block, chunk):
            if any(isinstance(values[source], Each) for source in node.all_input_nodes):
                return singly(values, block, chunk)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self._plain(values[each], block))
            return call(*args, **kwargs)

        return step

    def _one_by_one(self, node: fx.Node, call_of: Callable[[int], Callable]) -> Callable:
        def step(values, block, chunk):
            models, found = block.stop - block.start, []

            def of_model(source: fx.Node, m: int) -> object:
                value = values[source]
                if isinstance(value, Each):
                    return value[m]
                if isinstance(value, Pixels):
                    return value.numbers(self.dtype)
                images = source in self.of_images and _rows(value) == models * len(chunk.images)
                return value.chunk(models)[m] if images else value

            for m in range(models):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each, m=m: of_model(each, m))
                found.append(call_of(block.start + m)(*args, **kwargs))
            whole = node in self.of_images and all(_rows(each) == len(chunk.images) for each in found)
            return torch.cat(found) if whole else Each(found)

        return step


def _of_images(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose tensors come of the images, and not of weights or sizes alone: a length alone does not tell."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or ("tensor_meta" in node.meta and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _rows(value: object) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim else None
