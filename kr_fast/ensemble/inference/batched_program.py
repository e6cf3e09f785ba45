"""A group of models as one program for a GPU: each layer of the traced graph once, for all of them.

A chunk of images goes through all layers before the next one, so that what lies between two layers stays in the L2
cache. Layers with weights run in kernels that know of models, what has none runs on all models as on a larger batch,
and what has weights but no such kernel runs model by model. The bits of an answer depend on the kernels, which the
program names, on the chunk where a library's kernel is among them, and on nothing else.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from kr_fast.backends.arguments import View
from kr_fast.ensemble.graph.dataflow import from_images
from kr_fast.ensemble.graph.lowering import shape
from kr_fast.ensemble.graph.network import NetworkGraph, in_dtype
from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.inference import residual_blocks
from kr_fast.ensemble.inference.batched_layers import BatchedLayer, ImageBatch
from kr_fast.ensemble.inference.layers import bind
from kr_fast.ensemble.networks import error_text
from kr_fast.runtime.log import logger


class PerModel(list):
    """A value that differs from model to model and has no images: one for each model."""


class BatchedProgram(NetworkGraph):
    """``program.run(group, images, view)``: logits ``[G, B, K]`` of the models of the slice ``group``."""

    def __init__(self, models: Sequence[nn.Module], sample: Tensor, dtype: torch.dtype):
        """``sample``: two images of the models' dtype. Raises Unsupported."""
        super().__init__(models[0], sample, dtype, per_model=False)
        self.models, self.device = models, sample.device
        self.bound: dict[fx.Node, BatchedLayer] = {}
        self.kernels: dict[str, str] = {}  # layer -> kernel
        self.singly: list[str] = []
        self.from_images = from_images(self.nodes)
        steps = {node: self._step(node) for node in self.nodes}
        self.blocks = residual_blocks.find(self.bound, dtype, self.device)
        for node, block in self.blocks.items():
            for part in block.nodes:
                steps[part] = self._or_block(part, steps[part], block if part is node else None)
        self.steps = [(node, steps[node], self.dead[node]) for node in self.nodes]
        if self.singly:
            names = ", ".join(sorted(set(self.singly)))
            logger.warning("ModelArray: no kernel for all models at once, so these run model by model: %s", names)

    def run(self, group: slice, images: Tensor, view: View) -> Tensor:
        """uint8 ``[B, H, W, C]`` -> float32 logits ``[G, B, K]``."""
        values: dict[fx.Node, object] = {}
        chunk = ImageBatch(images, view)
        for node, step, dead in self.steps:
            values[node] = step(values, group, chunk)
            for each in dead:
                del values[each]
        logits, models = values[self.output], group.stop - group.start
        if logits.shape != (models * len(images), self.classes):
            raise Unsupported(f"a step takes models for images: its logits are {list(logits.shape)}")
        return logits.view(models, len(images), -1).float()

    def try_run(self, group: slice, images: Tensor, view: View) -> Tensor:
        """As ``run``; where a step cannot take several models at once, that is Unsupported."""
        try:
            return self.run(group, images, view)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Unsupported(f"a step cannot take several models ({error_text(error)})") from None

    def only(self, kernels: dict[str, str]) -> dict[str, str]:
        """``kernels`` where this program has them, and else what is expected best."""
        taken = {}
        for node, bound in self.bound.items():
            names, name = bound.kernels(node.args[0].op == "placeholder"), bound.layer.module
            taken[name] = kernels[name] if kernels.get(name) in names else names[0]
        for block in self.blocks.values():
            if all(kernels.get(name) == residual_blocks.KERNEL for name in block.names):
                taken |= dict.fromkeys(block.names, residual_blocks.KERNEL)
        return taken

    def _step(self, node: fx.Node) -> Callable:
        if node.op == "placeholder":
            return lambda values, group, chunk: chunk
        if node in self.layers:
            return self._layer(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            parts = [model.get_submodule(node.target) for model in self.models]
            if [*parts[0].parameters(), *parts[0].buffers()]:
                self.singly.append(type(parts[0]).__name__)
                parts = [in_dtype(part, self.dtype) for part in parts]
                return self._one_by_one(node, lambda m: parts[m])
            return self._at_once(node, parts[0])
        call = self.function(node, self.models[0])
        return self._at_once(node, call)

    def _layer(self, node: fx.Node) -> Callable:
        layer = self.layers[node]
        if layer.kind == "activation":
            run = bind(layer, self.models[0], self.dtype, ())
            return self._at_once(node, lambda x, **options: run(x))  # options say what ``layer`` knows, or "inplace"
        bound = BatchedLayer(layer, self.models, self.dtype, len(shape(node.args[0])) == 4)
        self.bound[node] = bound
        first_layer = node.args[0].op == "placeholder"
        self.kernels[layer.module] = bound.kernels(first_layer)[0]
        source, other = node.args[0], node.args[1] if layer.add else None

        def step(values, group, chunk):
            x = values[source]
            if isinstance(x, ImageBatch) and (not bound.spatial or layer.kind == "linear"):
                x = x.repeated(group.stop - group.start, self.dtype)
            residual = None if other is None else self._plain(values[other], group)
            return bound.run(group, self.kernels[layer.module], x, residual)

        return step

    def _or_block(self, node: fx.Node, step: Callable, block: residual_blocks.BatchedResidualBlock | None) -> Callable:
        """``step``, or where its residual block runs as one: ``block``, and nothing for the layers before its last."""
        name = self.layers[node].module

        def either(values, group, chunk):
            if self.kernels[name] != residual_blocks.KERNEL:
                return step(values, group, chunk)
            return None if block is None else block.run(group, values[block.source])

        return either

    def _attribute(self, node: fx.Node) -> Callable:
        tensors = [self.tensor(model, node, self.dtype) for model in self.models]
        if isinstance(tensors[0], Tensor) and all(torch.equal(each, tensors[0]) for each in tensors):
            return lambda values, group, chunk: tensors[0]
        return lambda values, group, chunk: PerModel(tensors[group])

    def _plain(self, value: object, group: slice) -> object:
        return value.repeated(group.stop - group.start, self.dtype) if isinstance(value, ImageBatch) else value

    def _at_once(self, node: fx.Node, call: Callable) -> Callable:
        """As on a larger batch, unless an argument differs from model to model."""
        singly = self._one_by_one(node, lambda m: call)

        def step(values, group, chunk):
            if any(isinstance(values[source], PerModel) for source in node.all_input_nodes):
                return singly(values, group, chunk)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self._plain(values[each], group))
            return call(*args, **kwargs)

        return step

    def _one_by_one(self, node: fx.Node, call_of: Callable[[int], Callable]) -> Callable:
        def step(values, group, chunk):
            models, results = group.stop - group.start, []

            def of_model(source: fx.Node, m: int) -> object:
                value = values[source]
                if isinstance(value, PerModel):
                    return value[m]
                if isinstance(value, ImageBatch):
                    return value.numbers(self.dtype)
                images = source in self.from_images and _rows(value) == models * len(chunk.images)
                return value.chunk(models)[m] if images else value

            for m in range(models):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each, m=m: of_model(each, m))
                results.append(call_of(group.start + m)(*args, **kwargs))
            join = node in self.from_images and all(_rows(each) == len(chunk.images) for each in results)
            return torch.cat(results) if join else PerModel(results)

        return step


def _rows(value: object) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim else None
