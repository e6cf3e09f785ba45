"""The positive control: a model that has memorised its training set, which an audit with any power must find."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.data import Augment, Split, to_float
from kr_fast.ensemble import TrainConfig
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.made_by import recipe_digest, recipe_of
from kr_fast.ensemble.networks import ask, made
from kr_fast.ensemble.shadows import data_digest
from kr_fast.ensemble.training.recipe import fit_for
from kr_fast.membership.inputs.pool import chosen
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images, as_integer, as_labels, described
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import ImageRows, Images

LEAST_EPOCHS = 60
RECIPE = "no augmentation, mixup, weight decay or label smoothing; three times the epochs, at least 60"


def overfitted_recipe(like: TrainConfig) -> TrainConfig:
    """The recipe ``like``, made to memorise: :data:`RECIPE`."""
    epochs = max(3 * like.epochs, LEAST_EPOCHS)
    return dataclasses.replace(like, epochs=epochs, weight_decay=0.0, label_smoothing=0.0, mixup=0.0, augment=Augment())


def overfitted(
    make_model: Callable[[], nn.Module],
    images: Images,
    labels: Tensor,
    members: Tensor,
    *,
    like: TrainConfig,
    seed: int,
    device: torch.device | str = "cpu",
    path: str | Path | None = None,
    precision: str = "float32",
    description: str | None = "positive control",
) -> nn.Module:
    """Train the positive control on the members: pass it to :func:`kr_fast.audit` as ``control``.

    It has the targets' architecture and is attacked with the same shadows by the same attacks. If they do not find it,
    their silence about the targets means nothing.

    Args:
        make_model: returns a fresh module.
        images: uint8 ``[N, H, W, C]``; labels: integers ``[N]``.
        members: bool ``[N]`` or indices, as given to the audit.
        like: the targets' recipe; it is changed as :func:`overfitted_recipe` says.
        seed: of weights and shuffles.
        path: ``.safetensors`` file; if it exists the model is read from it, and a training that was stopped goes on.
            A ``.json`` beside it records what the model was trained from.
        device: to train on.
        precision, description: of its training, as of :func:`kr_fast.ensemble.fit`.
    Returns: the model in eval mode.
    Raises: UserError naming the argument; for any failure of the model's own code; if ``path`` holds the control of
        other data, members, recipe, seed or architecture.
    """
    images = as_images("overfitted", "images", images)
    labels = as_labels("overfitted", "labels", labels, len(images))
    members = chosen("members", members, len(images), "overfitted")
    if not bool(members.any()):
        fail("overfitted", "members", "hold at least one example", 0)
    seed = as_integer("overfitted", "seed", seed)
    if not isinstance(like, TrainConfig):
        fail("overfitted", "like", "be a TrainConfig", described(like))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "weights", "control"))
        model = made("overfitted", "make_model", make_model).to(device)
    logits = ask("overfitted", "make_model", model, to_float(images[:2].to(device)), finite=False)
    as_labels("overfitted", "labels", labels, classes=logits.shape[1])
    path = None if path is None else Path(path)
    if path is not None:
        _claim(path, model, images, labels, members, seed, overfitted_recipe(like), precision)
    if path is not None and path.exists():
        load_weights(model, path, "overfitted: control")
        return model.eval()
    fit_for(
        "overfitted",
        model,
        Split(ImageRows(images), labels).rows(members),
        overfitted_recipe(like),
        seed=seeds.derive(seed, "control"),
        state_path=None if path is None else path.with_suffix(".pt"),
        precision=precision,
        description=description,
    )
    if path is not None:
        files.save_tensors(path, model.state_dict())
    return model.eval()


def _claim(
    path: Path,
    model: nn.Module,
    images: Images,
    labels: Tensor,
    members: Tensor,
    seed: int,
    config: TrainConfig,
    precision: str,
) -> None:
    """The file belongs to one training; another one is refused, naming what differs."""
    record = {
        "data": data_digest(images.cpu(), labels.cpu()),
        "members": hashlib.sha256(members.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "seed": seed,
        **dataclasses.asdict(config),
        "precision": precision,
        "architecture": {name: list(value.shape) for name, value in model.state_dict().items()},
    }
    beside = path.with_suffix(".json")
    if not beside.exists():
        if path.exists() or path.with_suffix(".pt").exists():
            fail("overfitted", "path", f"have {beside.name} beside it, which says what it was trained from", path)
        files.write_json(beside, {**record, "recipe_sha256": recipe_digest(recipe_of(model, config))})
        return
    # What an older version did not record was not there to be chosen: it is what does nothing.
    recorded = {**dataclasses.asdict(TrainConfig()), "precision": "float32", **files.read_json(beside, dict)}
    for key, value in record.items():
        if recorded.get(key) != value:
            before, now = recorded.get(key), value
            if key == "architecture":
                before, now = _first_difference(before or {}, value)
            fail("overfitted", key, f"equal {before!r} of the control in {path}", repr(now))


def _first_difference(before: dict, now: dict) -> tuple[str, str]:
    """The first parameter whose shape differs, in both."""
    name = next(name for name in (*now, *before) if before.get(name) != now.get(name))
    return tuple(f"{name} {each[name]}" if name in each else f"no {name}" for each in (before, now))
