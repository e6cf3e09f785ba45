"""Inputs of the ops that train M models at once."""

import torch


def batch_norm_inputs(shape=(3, 2, 4, 5, 6), dtype=torch.float64, seed=0, residual=True, affine=True):
    """x, weight, bias and residual of model_batch_norm."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = (normal(*shape) * 2 + 1).to(dtype)
    weight, bias = ((normal(shape[0], shape[4]) + 1).to(exact) for _ in range(2)) if affine else (None, None)
    return x, weight, bias, normal(*shape).to(dtype) if residual else None
