"""linear_grad_norms and linear_grad_samples by the kernels of a 1x1 convolution of a 1 x T image."""

import torch
from kr_fast.kernels.privacy import conv2d_grad_norms as kernels


def _image(tokens: torch.Tensor) -> torch.Tensor:
    """``[N, T, F]`` as ``[N, F, 1, T]``, channels_last."""
    return tokens.transpose(1, 2).unsqueeze(2)


def _launch(x, grad, bias: bool, rows: int, *, samples: bool):
    one = (1, 1)
    return kernels.launch(_image(x), _image(grad), one, one, (0, 0), one, 1, bias, rows, samples=samples)


def linear_grad_norms(call) -> torch.Tensor:
    """See kr_fast.ops.privacy.linear_grad_norms, where arguments are checked; both tensors are contiguous and of one
    dtype, and their records of fewer than 2^31 elements."""
    if call.x.shape[1] * call.multiplicity > 1:
        return _launch(*call, samples=False)
    seen, signal = (torch.linalg.vector_norm(each, dim=(1, 2), dtype=torch.float64) for each in call[:2])  # |x| |dy|
    return (signal * (torch.sqrt(seen * seen + 1.0) if call.bias else seen)).float()


def linear_grad_samples(call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`linear_grad_norms`."""
    weight, bias = _launch(*call, samples=True)
    return weight.flatten(2), bias
