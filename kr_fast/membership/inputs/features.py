"""What a classifier's last linear layer reads: images as points of a space in which like ones are near each other."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kr_fast.ensemble import ModelArray
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.queries import as_queries
from kr_fast.runtime.storage.image_rows import Images, batches

BATCH = 1024  # at most, of small images


def penultimate(array: ModelArray, images: Images) -> Tensor | None:
    """Features float32 ``[N, F]`` by the first model of the array, or None where it does not end in a linear layer.

    Args:
        images: uint8 ``[N, H, W, C]``.
    """
    prepared, query = Preprocessing(array.normalize, array.device), as_queries("none", *images.shape[1:3])[0]
    parts = (prepared.batch(batch, query, len(batch), array.own_dtype) for batch in batches(images, BATCH))
    return last_features(array.models[0], parts)


def last_features(model: nn.Module, batches: Iterable[Tensor]) -> Tensor | None:
    """What the last linear layer reads of some images, float32 ``[N, F]`` on the CPU.

    None where the model's answer is not what its last linear layer returns, or that layer does not read ``[N, F]``.

    Args:
        model: in eval mode.
        batches: at least one of what the model takes, on its device.
    """
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if not layers:
        return None
    calls: list[tuple[Tensor, Tensor]] = []
    hook = layers[-1].register_forward_hook(lambda _, given, result: calls.append((given[0], result)))
    parts = []
    try:
        with torch.no_grad():
            for batch in batches:
                calls.clear()
                logits = model(batch)
                if len(calls) != 1 or calls[0][1] is not logits or calls[0][0].ndim != 2:
                    return None
                parts.append(calls[0][0].float().cpu())
    finally:
        hook.remove()
    return torch.cat(parts)
