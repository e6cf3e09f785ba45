"""Kernels of the family ``nn`` in ``kr_fast._cuda``."""

from torch import Tensor

from kr_fast.backends import codes, native, registry, structs
from kr_fast.backends.arguments import GroupNorm
from kr_fast.backends.calls import GroupNormCall


def _group_norm(call: GroupNorm, y: Tensor, mean: None, rstd: None) -> None:
    with native.on(y):
        native.cuda.group_norm_silu(structs.group_norm(call, y), native.stream(y))


MOST_CHANNELS = 4096  # of a group: three float32 numbers of each in 48 KiB of shared memory, as kWidest of csrc


def _refuses_group_norm(call: GroupNormCall) -> str | None:
    reason = native.cuda_tensors(*codes.DTYPES)(call)
    if reason is None and call.size > MOST_CHANNELS:
        reason = f"a group must have at most {MOST_CHANNELS} channels, got {call.size}"
    return reason or ("there is no gradient in CUDA C++" if call.trains else None)


registry.differentiable(
    "group_norm_silu", "cuda", registry.Differentiable(_group_norm, None), refuses=_refuses_group_norm
)
