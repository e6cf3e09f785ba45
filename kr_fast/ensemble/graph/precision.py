"""Half precision where it costs little: what stays in float32, and how weights are rounded.

Measured on networks trained for a few epochs, nearly all of the error of a network in bfloat16 comes from four places
that are cheap to keep in float32: the image and the convolution that reads it, biases, pooled features and logits. The
rest is the rounding of weights. Inputs of a convolution are smooth and, behind a ReLU, positive, so it is the *sum* of
a filter's rounding errors that moves its output; error diffusion makes the sum as small as the last bit of the
filter's smallest weight.
"""

import math

import torch
from torch import Tensor, fx, nn

from kr_fast.ensemble.graph.lowering import Layer, products, shape

HALF = (torch.bfloat16, torch.float16)
IMAGE_CHANNELS = 4  # a convolution of more inputs costs too much to be left in float32
# Of the multiplications, of which Winograd's algorithm saves three in four. What is left of ResNet-20, in bfloat16,
# would save 7 % of the time and be all of the error.
NEARLY_ALL = 0.8
GROUP = 8  # inputs of a 1x1 filter whose errors are made to cancel


def in_float32(graph: fx.Graph, layers: dict[fx.Node, Layer], modules: dict[str, nn.Module]) -> set[fx.Node]:
    """The nodes to compute in float32: up to the convolutions of the image, and behind the last weighted layer but
    for the final linear one, which is computed in float32 too; 3x3 convolutions by Winograd's algorithm, which in
    float32 take less time than the definition in bfloat16, and all nodes where these are nearly all of the work."""
    winograd = {node for node, layer in layers.items() if layer.winograd}
    work = {n: products(n, layer, modules[layer.module]) for n, layer in layers.items() if layer.kind == "conv"}
    if sum(work[node] for node in winograd) > NEARLY_ALL * sum(work.values()):
        return set(graph.nodes)

    def heavy(node: fx.Node) -> bool:
        if node in layers:
            return layers[node].kind in ("conv", "linear")
        weights = modules[node.target].parameters() if node.op == "call_module" else ()
        return any(value.ndim > 1 for value in weights)

    front: set[fx.Node] = set()
    image_convs: set[fx.Node] = set()
    for node in graph.nodes:
        if not all(source in front for source in node.all_input_nodes):
            continue
        layer = layers.get(node)
        if not heavy(node):
            front.add(node)
        elif layer and layer.kind == "conv" and modules[layer.module].in_channels <= IMAGE_CHANNELS:
            image_convs.add(node)
    tail: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(user in tail for user in node.users):
            last = node in layers and layers[node].kind == "linear" and not any(map(heavy, tail))
            if last or not heavy(node):
                tail.add(node)
    return front | image_convs | tail | winograd


def insert_casts(graph: fx.Graph, exact: set[fx.Node], dtype: torch.dtype) -> None:
    """A cast wherever a value goes from float32, of the nodes ``exact``, to ``dtype`` or back; casts to it join."""
    for node in list(graph.nodes):
        meta = node.meta.get("tensor_meta")
        if not shape(node) or not meta.dtype.is_floating_point:
            continue
        users = [user for user in node.users if (user in exact) != (node in exact)]
        if not users:
            continue
        with graph.inserting_after(node):
            cast = graph.call_method("to", (node, dtype if node in exact else torch.float32))
        cast.meta["tensor_meta"] = meta
        for user in users:
            user.replace_input_with(node, cast)
        if node not in exact:
            exact.add(cast)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 ``[outputs, inputs, ...]`` in ``dtype``; for half precision with errors that cancel within a filter.

    For each output and input, what the rounding of one tap loses the next one takes (error diffusion, as in
    halftoning), and the smallest tap is the last: |sum of errors| <= half a last place of it. Filters without taps are
    grouped by ``GROUP`` inputs.
    """
    if dtype not in HALF or weight.numel() == 0:
        return weight.to(dtype)
    taps = weight[0, 0].numel()
    exact = weight.reshape(-1, taps if taps > 1 else math.gcd(weight.shape[1], GROUP)).T.clone()
    least = exact.abs().argmin(0, keepdim=True)
    last = exact[-1:].clone()
    exact[-1:] = exact.gather(0, least)
    exact.scatter_(0, least, last)
    result, carry = torch.empty_like(exact, dtype=dtype), torch.zeros_like(exact[0])
    for tap in range(len(exact)):
        carry += exact[tap]
        result[tap] = carry
        carry -= result[tap]
    last = result[-1:].clone()
    result[-1:] = result.gather(0, least)
    return result.scatter_(0, least, last).T.reshape(weight.shape)
