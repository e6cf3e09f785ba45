"""What a classifier was made by, in plain values: shadows of another recipe are not taken for those of a target."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from kr_fast.ensemble.training.recipe import TrainConfig
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import described

CROSS_ENTROPY = "cross-entropy"


def recipe_of(model: nn.Module, config: TrainConfig, loss: str = CROSS_ENTROPY, **further: Any) -> dict[str, Any]:
    """The recipe of a classifier: architecture, loss, training and augmentation.

    How many examples it was trained on is no part of it: shadows are trained on halves of a pool and their target on
    its members. An audit tells both numbers beside it.

    Args:
        model: a module of the architecture, of which names and shapes of parameters and buffers count.
        config: how it is trained.
        loss: what is minimised; further: what else that depends on, as plain values.
    Returns: strict JSON, as ``shadows.json`` beside shadow models holds it.
    Raises: UserError naming the argument.
    """
    if not isinstance(config, TrainConfig):
        fail("recipe_of", "config", "be a TrainConfig", described(config))
    values = {"architecture": architecture(model), "loss": loss, **dataclasses.asdict(config), **further}
    return json.loads(json.dumps(values, allow_nan=False))


def architecture(model: nn.Module) -> str:
    """SHA-256 of names and shapes of parameters and buffers."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def difference(recipe: Mapping[str, Any], of_shadows: Mapping[str, Any]) -> str:
    """The first value in which two recipes differ, in words; "" where they do not.

    An option of the training that an older version did not have counts as its default, which does nothing.
    """
    default = _flat(dataclasses.asdict(TrainConfig()))
    own, others = ({**default, **_flat(each)} for each in (recipe, of_shadows))
    # The architecture first, then the loss: whatever follows them may depend on them.
    keys = ("architecture", "loss", *own, *others)
    key = next((key for key in keys if own.get(key) != others.get(key)), None)
    if key is None:
        return ""
    if key == "architecture":
        return "another architecture"
    return f"{key} is {own.get(key, 'nothing')}, of the shadows {others.get(key, 'nothing')}"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat
