"""Kernels of the family ``distillation`` in ``kr_fast.kernels``."""

import torch

from kr_fast.backends import codes, native, registry


def _loss_forward(input, target, indices, labels, weight, options):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    with native.on(input):
        return kernels.forward(input, target, indices, labels, weight, options)


def _loss_backward(upstream, input, target, indices, labels, weight, stats, scale, options):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    with native.on(input):
        return kernels.backward(upstream, input, target, indices, labels, weight, stats, scale, options)


registry.differentiable(
    "distillation_loss",
    "triton",
    registry.Differentiable(_loss_forward, _loss_backward),
    refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16),
)


@registry.kernel(
    "distillation_metrics", "triton", refuses=native.triton_tensors(torch.float32, torch.bfloat16, torch.float16)
)
def distillation_metrics(input, target, labels, temperature, ignore_index):
    from kr_fast.kernels.distillation import distillation_metrics as kernels

    if target.dtype == torch.float64:
        target = target.float()
    outputs = codes.empty_metrics(input, labels)
    with native.on(input):
        kernels.metrics(input, target, labels, temperature, ignore_index, outputs)
    return outputs
