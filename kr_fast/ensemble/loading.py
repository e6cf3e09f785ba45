"""Models that a user names: a factory ``pkg.mod:name`` or one of the package's own, and a file of weights."""

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.models import CLASSIFIERS, classifier
from kr_fast.runtime import files
from kr_fast.runtime.errors import UserError, fail


def factory(where: str, argument: str, name: str, **offered: int) -> Callable[[], Any]:
    """What makes the object ``pkg.mod:name``, called with those of the offered keywords that it takes.

    Raises: UserError where it cannot be imported, or needs more than is offered.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        rule = "name an importable pkg.mod:factory"
        raise UserError(f"{where}: {argument} must {rule}, got {name} ({error})") from error
    try:
        signature = inspect.signature(found)
        takes_any = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
        keywords = {key: value for key, value in offered.items() if takes_any or key in signature.parameters}
        signature.bind(**keywords)
    except (TypeError, ValueError) as error:
        rule = "name a factory that can be called with num_classes and in_channels, or less"
        raise UserError(f"{where}: {argument} must {rule}, got {name} ({error})") from error
    return functools.partial(found, **keywords)


def model_factory(
    where: str, argument: str, name: str, *, num_classes: int, image_shape: tuple[int, int, int], width: int = 16
) -> Callable[[], nn.Module]:
    """Makes classifiers: ``pkg.mod:factory``, or resnet8, resnet14, resnet20, resnet32 of this package."""
    height, side, channels = image_shape
    offered = {"num_classes": num_classes, "in_channels": channels}
    if name in CLASSIFIERS:
        return functools.partial(classifier, name, **offered, width=width, image_size=max(height, side))
    if ":" not in name:
        fail(where, argument, f"be pkg.mod:factory or one of {', '.join(CLASSIFIERS)}", name or "nothing")
    make = factory(where, argument, name, **offered)
    if not isinstance(model := make(), nn.Module):
        fail(where, argument, "name a factory that returns a torch module", f"{name} -> {type(model)}")
    return make


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Load a state dict that must fit, naming the first tensor that does not."""
    try:
        safe = path.suffix == ".safetensors"
        found = files.load_tensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each library has errors of its own for a file that is not one of its files
        why = str(error).split("\n")[0].split(". ")[0]  # and not the advice behind it, to load unsafely
        raise UserError(f"{where} must be a readable .safetensors or .pt state dict, got {path} ({why})") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} must hold a state dict, got {type(found).__name__} in {path}")
    wanted = model.state_dict()
    for name, value in wanted.items():
        shape = list(found[name].shape) if isinstance(found.get(name), Tensor) else None
        if shape != list(value.shape):
            got = "nothing" if shape is None else shape
            raise UserError(f"{where} must hold {name} of shape {list(value.shape)}, got {got} in {path}")
    model.load_state_dict({name: found[name] for name in wanted})
