"""Kernels of the family ``batched`` in ``kr_fast._cuda``."""

import torch
from torch import Tensor

from kr_fast.backends import native, registry, structs
from kr_fast.backends.arguments import ModelResidualBlock
from kr_fast.backends.calls import ResidualBlockCall


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
def model_residual_block(call: ModelResidualBlock) -> Tensor:
    # Addresses of a GPU's own blocks of memory are multiples of 16, those of views need not be.
    halves = {"x": call.x, "weight1": call.weight1, "weight2": call.weight2}
    call = call._replace(**{name: value.clone() for name, value in halves.items() if value.data_ptr() % 16})
    y = torch.empty_like(call.x)
    with native.on(y):
        native.cuda.model_residual_block(structs.model_residual_block(call, y), native.stream(y))
    return y
