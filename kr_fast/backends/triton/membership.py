"""Kernels of the family ``membership`` in ``kr_fast.kernels``."""

import torch

from kr_fast.backends import native, registry


@registry.kernel(
    "membership_signals", "triton", refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16)
)
def membership_signals(logits, labels, want):
    from kr_fast.kernels.membership import membership_signals as kernels

    with native.on(logits):
        return kernels.signals(logits if logits.stride(1) == 1 else logits.contiguous(), labels, want)
