"""Kernels of the family ``batched`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import native, registry
from kr_fast.backends.calls import ResidualBlockCall
from kr_fast.backends.native import address


def _refuses_residual_block(call: ResidualBlockCall) -> str | None:
    why = native.cuda_tensors(torch.float16, torch.bfloat16)(call)
    size = call.channels, call.height, call.width
    if why is None and call.channels and not native.cuda.residual_block_images(*size):
        why = (
            "channels must be 16, 32 or 64, and an image, beside the weights of both convolutions, fit a block of "
            f"threads of compute capability 8.0 or later, got {size[0]} channels of {size[1]} x {size[2]}"
        )
    return why


@registry.kernel("model_residual_block", "cuda", refuses=_refuses_residual_block)
def model_residual_block(x, weight1, bias1, weight2, bias2, scale, shift, relu) -> Tensor:
    models, images, height, width, channels = x.shape
    # Addresses of a GPU's own blocks of memory are multiples of 16, those of views need not be.
    x, weight1, weight2 = (each if each.data_ptr() % 16 == 0 else each.clone() for each in (x, weight1, weight2))
    y = torch.empty_like(x)
    with native.on(x):
        native.cuda.model_residual_block(
            x.data_ptr(), weight1.data_ptr(), weight2.data_ptr(), address(bias1), address(bias2), address(scale),
            address(shift), x.dtype == torch.bfloat16, models, images, height, width, channels, relu, y.data_ptr(),
            native.stream(x),
        )  # fmt: skip
    return y
