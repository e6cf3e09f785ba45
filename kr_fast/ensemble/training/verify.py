"""A stacked graph against its module: a trace cannot follow everything that a forward may do."""

import copy

import torch
from torch import Tensor, nn

from kr_fast.backends import registry
from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.networks import error_text
from kr_fast.ensemble.training.layer_ops import stacked, unstacked
from kr_fast.ensemble.training.stacked_graph import StackedGraph


def check(model: nn.Module, graph: StackedGraph, images: Tensor, classes: int) -> None:
    """One step's logits, gradients and running statistics against the module's own, in float64 on the CPU.

    ``images``: float ``[N, C, H, W]``. Raises: Unsupported.
    """
    model, x = copy.deepcopy(model).cpu().double().train(), images.cpu().double()
    weights = {
        name: stacked(value.detach()[None].clone(), name in graph.channels_last)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    for name in trained:
        weights[name].requires_grad_()
    try:
        with torch.random.fork_rng(devices=[]), registry.forced("reference"):
            logits, seen = graph(weights, x[None])
            expected = model(x)
            if expected.ndim != 2 or expected.shape[1] < classes or expected.shape != logits.shape[1:]:
                raise Unsupported(f"its output is {list(expected.shape)} and not logits of {classes} classes")
            pairs = [(logits[0], expected)]
            grads = torch.autograd.grad(logits.square().mean(), [weights[name] for name in trained], allow_unused=True)
            expected.square().mean().backward()
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"it cannot run for several models ({error_text(error)})") from None
    for name, grad in zip(trained, grads, strict=True):
        own = model.get_parameter(name).grad
        if grad is None or own is None:
            raise Unsupported(f"{name} takes no part in its output")
        pairs.append((unstacked(grad, name in graph.channels_last)[0], own))
    for name, (mean, var, rows) in zip(graph.norms, seen, strict=True):
        norm = model.get_submodule(name)
        for what, value in (("running_mean", mean[0]), ("running_var", var[0] * (rows / (rows - 1)))):
            pairs.append((torch.lerp(weights[f"{name}.{what}"][0], value, norm.momentum), norm.get_buffer(what)))
    if not all(torch.allclose(a, b, rtol=1e-6, atol=1e-9 + 1e-7 * float(b.detach().abs().max())) for a, b in pairs):
        raise Unsupported("its trace does not give its answers")
