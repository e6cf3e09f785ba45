"""The graph of the architecture that all models of an array share, with the bytes that it needs."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble.graph import dataflow
from kr_fast.ensemble.graph.lowering import lower, shape
from kr_fast.ensemble.graph.precision import HALF, in_float32, insert_casts
from kr_fast.ensemble.graph.trace import Unsupported, attribute


class NetworkGraph:
    """What runs, in which order and precision; a program binds it to weights.

    Attributes:
        nodes, output: of the lowered graph, in order; ``layers`` and ``constants`` as in :class:`lowering.Lowered`.
        dead: node -> values that nobody reads after it.
        fixed: nodes that follow from weights alone.
        classes: number of logits.
        bytes_per_image: of all values that live at a time, at most; ``widest``: of a layer's inputs and output.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype, *, per_model: bool):
        """For images like ``sample``, two ``[2, C, H, W]`` of the model's dtype.

        ``per_model``: for a program that runs one model at a time. In half precision the ends are then computed in
        float32, see ``precision.py``, 3x3 convolutions may run by Winograd's algorithm, and sums lie in the memory of
        one of their terms.

        Raises: Unsupported.
        """
        winograd = per_model and sample.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        lowered = lower(model, sample, winograd=winograd)
        self.graph, self.layers, self.constants = lowered.graph, lowered.layers, lowered.constants
        self.dtype, self.in_float32 = dtype, set()
        if per_model and dtype in HALF:
            modules = dict(model.named_modules(remove_duplicate=False))
            self.in_float32 = in_float32(self.graph, self.layers, modules)
            insert_casts(self.graph, self.in_float32, dtype)
        if not per_model:
            for layer in self.layers.values():
                layer.in_place = False
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        self.output = next(node for node in self.graph.nodes if node.op == "output").args[0]
        logits = shape(self.output) if isinstance(self.output, fx.Node) else None
        if logits is None or len(logits) != 2:
            raise Unsupported("its trace does not end in logits")
        self.classes = logits[1]
        self.dead = dataflow.dead_after(self.nodes, self.output)
        self.fixed = dataflow.from_weights(self.nodes, model)
        self.bytes_per_image, self.widest = self._most_live(), self._widest()

    def node_dtype(self, node: fx.Node) -> torch.dtype:
        """What the node is computed in."""
        return torch.float32 if node in self.in_float32 else self.dtype

    def bytes_of(self, node: fx.Node) -> int:
        """Bytes of the node's value for one image."""
        size = shape(node)  # of the sample's two images
        return math.prod(size) // 2 * self.node_dtype(node).itemsize if size and node not in self.fixed else 0

    def _widest(self) -> int:
        return max(self.bytes_of(n) + sum(map(self.bytes_of, n.all_input_nodes)) for n in self.nodes) or 1

    def _most_live(self) -> int:
        live, most = 0, 0
        for node in self.nodes:
            layer = self.layers.get(node)
            reused = node.args[1] if layer and layer.in_place else None  # the sum lies in the other term's memory
            live += 0 if reused else self.bytes_of(node)
            most = max(most, live)
            live -= sum(self.bytes_of(each) for each in self.dead[node] if each is not reused)
        return most

    def tensor(self, model: nn.Module, node: fx.Node, dtype: torch.dtype) -> object:
        """What a get_attr node names in ``model``; numbers in ``dtype``."""
        own = self.constants.get(node.target)
        value = attribute(model, node.target) if own is None else own
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.to(dtype) if value.is_floating_point() else value

    def function(self, node: fx.Node, model: nn.Module) -> Callable:
        """What a node that is no layer calls: its module in the node's dtype, function or method."""
        if node.op == "call_module":
            return in_dtype(model.get_submodule(node.target), self.node_dtype(node))
        if node.op == "call_method":
            name = node.target
            return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
        return node.target


def in_dtype(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``part``, or a copy of it where it holds numbers of another dtype."""
    tensors = [*part.parameters(), *part.buffers()]
    if any(value.is_floating_point() and value.dtype != dtype for value in tensors):
        part = copy.deepcopy(part).to(dtype)
    return part
