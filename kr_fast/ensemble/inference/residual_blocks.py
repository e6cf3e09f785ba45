"""Residual blocks among a graph's layers, which one kernel may run instead of one for each layer.

A block is two 3x3 convolutions of as many channels out as in, a ReLU between them, and the sum with what the first
reads, or with what a BatchNorm and ReLU before the first read (pre-activation).
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from kr_fast.ensemble.graph import kinds
from kr_fast.ensemble.graph.lowering import shape
from kr_fast.ensemble.inference.batched_layers import BatchedLayer, merged, of_group, split
from kr_fast.ops.batched import model_residual_block as op

KERNEL = "block"  # the name of the kernel of each of a block's layers


class BatchedResidualBlock:
    """The layers ``parts`` (perhaps a BatchNorm, the first and the second convolution) as one, of all models."""

    def __init__(self, nodes: Sequence[fx.Node], parts: Sequence[BatchedLayer]):
        self.nodes, self.source = tuple(nodes), nodes[0].args[0]
        *before, self.first, self.second = parts
        self.names = [each.layer.module for each in parts]
        self.scale = self.shift = None
        if before:
            self.scale, self.shift = before[0].weight[:, :, 0, 0, 0].float().contiguous(), before[0].bias

    def run(self, group: slice, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`BatchedLayer.run`; ``x`` is what the sum adds."""
        first, second = self.first, self.second
        weights = [each for b in (first, second) for each in (b.weight[group], of_group(b.bias, group))]
        more = {"scale": of_group(self.scale, group), "shift": of_group(self.shift, group)}
        x = split(x, len(weights[0]))
        return merged(op.model_residual_block(x, *weights, **more, relu=second.layer.activation is not None))


def find(
    bound: dict[fx.Node, BatchedLayer], dtype: torch.dtype, device: torch.device
) -> dict[fx.Node, BatchedResidualBlock]:
    """Blocks by the node of their second convolution, where a kernel of the device runs them."""
    blocks, uses = {}, Counter(each.layer.module for each in bound.values())
    for second in bound:
        nodes = _block(second, bound)
        once = nodes and all(uses[bound[node].layer.module] == 1 for node in nodes)  # a module has one kernel
        if not once or not _unwritten(nodes[0].args[0], second, bound):
            continue
        if op.runs_preferred(device.type, dtype, *shape(second)[1:]):
            blocks[second] = BatchedResidualBlock(nodes, [bound[node] for node in nodes])
    return blocks


def _block(second: fx.Node, bound: dict[fx.Node, BatchedLayer]) -> list[fx.Node] | None:
    if not bound[second].layer.add or not _is_convolution(bound[second], (None, kinds.RELU)):
        return None
    first, source = second.args
    if not _only_for(first, second, bound) or bound[first].layer.add:
        return None
    if not _is_convolution(bound[first], (kinds.RELU,)):
        return None
    inner = first.args[0]
    if inner is source:
        return [first, second] if source.op != "placeholder" else None
    if not _only_for(inner, first, bound) or inner.args[0] is not source or source.op == "placeholder":
        return None
    layer = bound[inner].layer
    return [inner, first, second] if layer.kind == "affine" and layer.activation == kinds.RELU else None


def _is_convolution(bound: BatchedLayer, activations: Sequence[tuple | None]) -> bool:
    _, outputs, *kernel, inputs = bound.weight.shape
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    same = bound.layer.kind == "conv" and bound.layer.activation in activations
    return same and bound.options == plain and kernel == [3, 3] and inputs == outputs


def _only_for(node: fx.Node, user: fx.Node, bound: dict[fx.Node, BatchedLayer]) -> bool:
    return node in bound and list(node.users) == [user]


def _unwritten(source: fx.Node, second: fx.Node, bound: dict[fx.Node, BatchedLayer]) -> bool:
    """Nothing before ``second`` may write into what a block reads, which is then read later than by its first layer."""
    for node in source.graph.nodes:
        if node is second:
            return True
        if source in node.all_input_nodes and node not in bound:
            return False
    return False
