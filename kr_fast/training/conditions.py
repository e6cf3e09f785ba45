"""When a fused op computes what the modules of a network would."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)  # dictionaries, one for all modules


def plain(x: Tensor) -> bool:
    """Whether the fused ops compute on ``x`` as the modules would, in float32."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def mixed(x: Tensor) -> bool:
    """Whether ``x`` is of a step in mixed precision: autocast to bfloat16, weights in float32."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast and x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"


def hooked(*modules: nn.Module) -> bool:
    own = any(getattr(module, name) for module in modules for name in HOOKS)
    return own or any(_HOOKS_OF_ALL)


def is_norm(module: nn.Module) -> bool:
    """A BatchNorm of float32 that batch_norm_act can take."""
    return (
        type(module) is nn.BatchNorm2d
        and module.affine
        and module.track_running_stats
        and module.momentum is not None
        and module.weight.dtype == torch.float32
    )
