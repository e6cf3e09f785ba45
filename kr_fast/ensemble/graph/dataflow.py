"""What the values of a graph follow from, and how long they are read."""

import operator
from collections.abc import Callable, Iterable, Sequence

from torch import fx, nn

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
_WRITING = {getattr(operator, name) for name in _IN_PLACE}


def dead_after(
    nodes: Sequence[fx.Node],
    output: fx.Node,
    reads: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nobody reads after it, where ``nodes`` run in this order; ``output`` is read behind."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for source in reads(node):
            last[source] = node
    last.pop(output, None)
    dead: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for source, node in last.items():
        dead[node].append(source)
    return dead


def from_images(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose tensors come of the images, and not of weights or sizes alone: a length alone does not tell."""
    result: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or ("tensor_meta" in node.meta and not result.isdisjoint(node.all_input_nodes)):
            result.add(node)
    return result


def from_weights(nodes: Sequence[fx.Node], model: nn.Module) -> set[fx.Node]:
    """Nodes that follow from weights alone: the same for all images, unless one is written into."""
    result: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.all_input_nodes and result.issuperset(node.all_input_nodes)):
            result.add(node)
    for node in nodes:
        into = node.kwargs.get("out", node.args[0] if node.args else None) if _writes(node, model) else None
        while isinstance(into, fx.Node):
            if into in result:  # it, or what it may be a view of
                return {each for each in result if each.op == "get_attr"}
            into = into.args[0] if into.args and into.op != "call_module" else None
    return result


def _writes(node: fx.Node, model: nn.Module) -> bool:
    """Whether the node may write into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(node.target), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in _WRITING or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
