"""The positive control: a model that has memorised its training set, which an audit with any power must find."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.data import Augment, Split
from kr_fast.ensemble import TrainConfig, fit
from kr_fast.runtime import files, seeds

LEAST_EPOCHS = 60
RECIPE = "no augmentation, weight decay or label smoothing; three times the epochs, at least 60"


def overfitted_recipe(like: TrainConfig) -> TrainConfig:
    """The recipe ``like``, made to memorise: :data:`RECIPE`."""
    epochs = max(3 * like.epochs, LEAST_EPOCHS)
    return dataclasses.replace(like, epochs=epochs, weight_decay=0.0, label_smoothing=0.0, augment=Augment())


def overfitted(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    members: Tensor,
    *,
    like: TrainConfig,
    seed: int,
    device: torch.device | str = "cpu",
    path: str | Path | None = None,
    description: str | None = "positive control",
) -> nn.Module:
    """Train the positive control on the members: pass it to :func:`kr_fast.audit` as ``control``.

    It has the targets' architecture and is attacked with the same shadows by the same attacks. If they do not find it,
    their silence about the targets means nothing.

    Args:
        make_model: returns a fresh module.
        images: uint8 ``[N, H, W, C]``; labels: int64 ``[N]``.
        members: bool ``[N]``, as given to the audit.
        like: the targets' recipe; it is changed as :func:`overfitted_recipe` says.
        seed: of weights and shuffles.
        path: ``.safetensors`` file; if it exists the model is read from it, and a training that was stopped goes on.
    Returns: the model in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "weights", "control"))
        model = make_model().to(device)
    path = None if path is None else Path(path)
    if path is not None and path.exists():
        model.load_state_dict(files.load_tensors(path))
        return model.eval()
    fit(
        model,
        Split(images[members], labels[members]),
        overfitted_recipe(like),
        seed=seeds.derive(seed, "control"),
        state_path=None if path is None else path.with_suffix(".pt"),
        description=description,
    )
    if path is not None:
        files.save_tensors(path, model.state_dict())
    return model.eval()
