"""What a classifier's last linear layer reads: images as points of a space in which like ones are near each other."""

import torch
from torch import Tensor, nn

from kr_fast.ensemble import ModelArray
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.queries import as_queries

BATCH = 1024


def penultimate(array: ModelArray, images: Tensor) -> Tensor | None:
    """Features float32 ``[N, F]`` by the first model of the array, or None where it does not end in a linear layer.

    Args:
        images: uint8 ``[N, H, W, C]``.
    """
    model = array.models[0]
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if not layers:
        return None
    prepared, query = Preprocessing(array.normalize, array.device), as_queries("none", *images.shape[1:3])[0]
    calls: list[tuple[Tensor, Tensor]] = []
    hook = layers[-1].register_forward_hook(lambda _, given, result: calls.append((given[0], result)))
    parts = []
    try:
        with torch.no_grad():
            for batch in images.split(BATCH):
                calls.clear()
                logits = model(prepared.batch(batch, query, len(batch), array.own_dtype))
                if len(calls) != 1 or calls[0][1] is not logits or calls[0][0].ndim != 2:
                    return None
                parts.append(calls[0][0].float().cpu())
    finally:
        hook.remove()
    return torch.cat(parts)
