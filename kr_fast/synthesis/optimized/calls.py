"""What a patched network asks of its calls."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.runtime.errors import UserError, fail
from kr_fast.training.conditions import HOOKS
from kr_fast.training.patches import Patches

_OP = "optimize"


def check_call(model: Any, class_labels: Tensor | None, step: Tensor | None) -> None:
    """What a patched network asks of a call, before anything is computed."""
    check_hooks(model)
    trained, device = hasattr(model, "_kr_fast_shifted"), next(model.parameters()).device.type
    if trained and torch.is_autocast_enabled(device) and (dtype := torch.get_autocast_dtype(device)) != torch.bfloat16:
        rule = "be called without autocast, or under that to bfloat16, once optimized for training"
        fail(_OP, "model", rule, f"autocast to {str(dtype).removeprefix('torch.')}")
    if not trained and torch.is_grad_enabled() and next(model.parameters()).requires_grad:
        raise UserError(
            f"{_OP}: model must be called under torch.no_grad() or torch.inference_mode(), got grad mode; "
            "optimize(model, training=True) takes gradients"
        )
    embedding = getattr(model, "class_embedding", model)  # a DiT always has one
    if (class_labels is None) != (embedding is None):
        rule = "be given for" if class_labels is None else "be None for"
        kind = type(embedding).__name__
        fail(_OP, "class_labels", f"{rule} a model with class embedding {kind}", _describe(class_labels))
    if step is not None:
        if getattr(model, "_kr_fast_table", None) is None:
            fail(_OP, "step", "come after prepare_steps(timesteps)", "no table")
        if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.int64:
            fail(_OP, "step", "be a 0-dim int64 tensor", _describe(step))


def watch(handle: Patches, module: nn.Module, inside: Iterable[nn.Module | None]) -> None:
    """Refuse hooks on modules ``inside`` that the patched forward of ``module`` does not call: now and at its calls."""
    hooks = tuple(getattr(each, name) for each in inside if each is not None for name in HOOKS)
    handle.set(module, "_kr_fast_hooks", hooks)  # dictionaries, which hooks registered later go into
    check_hooks(module)


def check_hooks(module: Any) -> None:
    """Raises: UserError naming a module that :func:`watch` was given, if there is a hook on it."""
    if torch.compiler.is_compiling() or not any(module._kr_fast_hooks):
        return
    watched = {id(hooks) for hooks in module._kr_fast_hooks if hooks}
    found = (name for name, each in module.named_modules() if watched & {id(getattr(each, kind)) for kind in HOOKS})
    rule = "have hooks only on modules that run as they are (restore() lets all of them run)"
    fail(_OP, "model", rule, f"one on {next(found)} of {type(module).__name__}")


def _describe(value: Any) -> Any:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
