"""The one place where ops enter ``torch.library``: schema, implementation for every device, fake, and derivatives.

``define`` + ``impl`` and not ``custom_op``: about 5 us a call instead of 18. Implementations ask the registry, so the
dispatcher key covers all backends. A derivative that an op does not have is an error and never a zero: backward
through such an op raises, in a graph that torch.export wrote too, and so does a tangent of forward-mode AD.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

library = torch.library.Library("kr_fast", "DEF")


def _any_requires_grad(*arguments: Any) -> bool:
    """Whether one of these, or a tensor in a list among them, requires gradients: torch's own, which 2.6 lacks."""
    each = [item for value in arguments for item in (value if isinstance(value, list | tuple) else (value,))]
    return any(isinstance(item, Tensor) and item.requires_grad for item in each)


any_requires_grad = getattr(torch._C, "_any_requires_grad", _any_requires_grad)


def define(
    schema: str, *, fake: Callable, backward: Callable | None = None, setup_context: Callable | None = None
) -> Callable:
    """Register the decorated function as the op of ``schema``, with ``fake`` for its output's metadata.

    ``backward`` and ``setup_context`` are as for ``torch.library.register_autograd``; without them backward raises.
    """
    name = schema.split("(")[0]

    def add(function: Callable) -> Callable:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kr_fast::{name}", fake, lib=library)
        library.impl(name, _autograd(name, backward or _refused(name), setup_context), "Autograd", with_keyset=True)
        return function

    return add


def call(op: torch._ops.OpOverload, *arguments) -> Any:
    """``op(*arguments)``, past its autograd kernel where there is nothing to differentiate: that costs 4 us."""
    direct = not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any_requires_grad(*arguments))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if not direct:
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _autograd(name: str, backward: Callable, setup_context: Callable | None) -> Callable:
    """The op's kernel under the key "Autograd": ``torch.library.register_autograd``'s, behind a check for tangents."""
    op = getattr(torch.ops.kr_fast, name).default
    names = [argument.name for argument in op._schema.arguments]
    kernel = _in_place(name, op) if op._schema.is_mutable else make_autograd_impl(op, Info(backward, setup_context))

    def autograd(keyset, *arguments):
        no_transform(name)
        if forward_ad._current_level >= 0:
            refuse_tangents(name, dict(zip(names, arguments, strict=False)))
        return kernel(keyset, *arguments)

    return autograd


def no_transform(name: str) -> None:
    """Raise under ``torch.func``'s grad or jvp. Its vmap is torch's affair: the dispatcher takes image by image."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(f"{name}: the call must not be under torch.func (grad, jvp); use autograd")


def _refused(name: str) -> Callable:
    def backward(ctx, *upstream):
        raise no_backward(name)

    return backward


def _in_place(name: str, op: torch._ops.OpOverload) -> Callable:
    """For an op that writes into its arguments."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]

    def autograd(keyset, *arguments):
        if torch.is_grad_enabled() and any_requires_grad(*arguments):
            raise no_backward(name)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        mark_written(*(each for each, into in zip(arguments, written, strict=False) if into))
        return outputs

    return autograd


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd that these were written into: a backward that has saved one then raises."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def no_backward(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: there is no derivative of this op; call it under torch.no_grad(), or detach its inputs"
    )


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, value, *inputs):
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx, upstream):
        raise no_backward(ctx.name)


def without_backward(name: str, value: Tensor, *inputs: Tensor | None) -> Tensor:
    """``value``, which an op that is not in the dispatcher made of ``inputs``: backward through it raises."""
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs):
        return _NoBackward.apply(name, value, *inputs)
    return value


def refuse_tangents(name: str, arguments: dict[str, Any]) -> None:
    """Raise if one of ``arguments`` is a dual tensor of forward-mode AD."""
    for argument, value in arguments.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None:
                raise RuntimeError(
                    f"{name}: {argument} must not be a dual tensor: there is no forward-mode derivative; "
                    "use backward, or the formula in plain torch"
                )


def is_plain(*tensors: Tensor) -> bool:
    """Whether a kernel may take the tensors' addresses.

    No subclass; no tracing, dispatch mode or forward-mode AD around the call.
    """
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0 or torch._C._get_tracing_state():
        return False
    for each in tensors:  # noqa: SIM110  (a generator would cost as much again)
        if type(each) is not Tensor and type(each) is not torch.nn.Parameter:
            return False
    return True


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether an op's own ``autograd.Function`` may take these past the dispatcher: plain and not transformed."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return is_plain(*(each for each in tensors if each is not None))


def wants_dispatcher(upstream: Tensor) -> bool:
    """Whether backward itself is differentiated (create_graph), traced, or runs for many upstream gradients at once."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(upstream) or not is_plain(upstream)


def save(ctx, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward`` that takes inference tensors, which autograd does not: nothing may write into them."""
    ctx.inference = None
    for each in tensors:
        if each is not None and each.is_inference():
            ctx.inference = [each if each is not None and each.is_inference() else None for each in tensors]
            tensors = [None if kept is not None else each for each, kept in zip(tensors, ctx.inference, strict=True)]
            break
    ctx.save_for_backward(*tensors)


def saved(ctx) -> tuple[Tensor | None, ...]:
    """What :func:`save` was given."""
    if ctx.inference is None:
        return ctx.saved_tensors
    return tuple(
        kept if kept is not None else each for each, kept in zip(ctx.saved_tensors, ctx.inference, strict=True)
    )
