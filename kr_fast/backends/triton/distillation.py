"""Kernels of the family ``distillation`` in ``kr_fast.kernels``."""

import torch

from kr_fast.backends import native, registry


def _distillation_forward(input, target, indices, labels, weight, *parameters):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    with native.on(input):
        return kernels.forward(input, target, indices, labels, weight, *parameters)


def _distillation_backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    with native.on(input):
        return kernels.backward(upstream, input, target, indices, labels, weight, stats, scale, *parameters[:-1])


registry.differentiable(
    "distillation_loss",
    "triton",
    registry.Differentiable(_distillation_forward, _distillation_backward),
    refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16),
)


@registry.kernel(
    "distillation_metrics", "triton", refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16)
)
def distillation_metrics(input, target, labels, temperature):
    from kr_fast.kernels.distillation import distillation_metrics as kernels

    if target.dtype == torch.float64:
        target = target.float()
    with native.on(input):
        return kernels.metrics(input, target, labels, temperature)
