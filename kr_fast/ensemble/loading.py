"""Models that a user names: a factory ``pkg.mod:name``, or one of the package's own."""

import functools
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.networks import an, error_text, takes_logits
from kr_fast.models import CLASSIFIERS, classifier
from kr_fast.runtime.errors import UserError, fail

FACTORY = "name a factory that returns a torch module"

__all__ = ["FACTORY", "factory", "imported", "load_weights", "model_factory"]


def factory(where: str, argument: str, name: str, **offered: int) -> Callable[[], Any]:
    """What makes the object ``pkg.mod:name``, called with those of the offered keywords that it takes.

    A module in the working directory is found, here and in the processes that are started from here. ``name`` may have
    points: ``pkg.mod:Class.method``.

    Raises: UserError where it cannot be imported, with the words of whatever its code raises, or needs more than is
        offered.
    """
    make = imported(where, argument, name, "factory")
    if isinstance(make, nn.Module) or not callable(make):
        kind = "the network itself" if isinstance(make, nn.Module) else an(type(make).__name__)
        fail(where, argument, "name a function or class that makes a network", f"{name}, which is {kind}")
    try:
        signature = inspect.signature(make)
        keywords = {key: value for key, value in offered.items() if key in signature.parameters}
        if any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
            keywords = _passed_on(make, offered, offered.keys() - keywords)
        signature.bind(**keywords)
    except (TypeError, ValueError) as error:
        rule = "name a factory that can be called with num_classes and in_channels, or less"
        raise UserError(f"{where}: {argument} must {rule}, got {name} ({error})") from error
    return functools.partial(make, **keywords)


def imported(where: str, argument: str, name: str, what: str) -> Any:
    """The object ``pkg.mod:name``, found as :func:`factory` says; ``what``: its kind in words, for the error."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        why = error_text(error)
        if isinstance(error, SystemExit):
            why = 'its import ends the program; put what a script does under if __name__ == "__main__"'
        elif module.endswith(".py") or os.sep in module:
            why = f"{why}; a module is named as in an import, not as a file"
        raise UserError(f"{where}: {argument} must name an importable pkg.mod:{what}, got {name} ({why})") from error


def _passed_on(make: Callable[..., Any], offered: dict[str, int], unsure: set[str]) -> dict[str, int]:
    """``offered`` without those of ``unsure`` that ``make(**kwargs)`` hands on to code that does not take them.

    As torchvision's functions do with ``in_channels``. What they take is known once they are called.
    """
    keywords, refused = offered, unsure
    while refused:
        refused = set()
        try:
            with torch.random.fork_rng(devices=[]):
                make(**keywords)
        except TypeError as error:
            refused = {key for key in unsure & keywords.keys() if f"'{key}'" in str(error)}
        except (Exception, SystemExit):  # of its own, which is told where the network is made
            break
        keywords = {key: value for key, value in keywords.items() if key not in refused}
    return keywords


def model_factory(
    where: str,
    argument: str,
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 16,
    sample: Tensor | None = None,
) -> Callable[[], nn.Module]:
    """Makes classifiers: ``pkg.mod:factory``, or resnet8, resnet14, resnet20, resnet32 of this package.

    A factory's network is asked once; where it returns its logits inside something else (``output.logits``),
    :class:`kr_fast.ensemble.LogitsOf` is put around it.

    Args:
        sample: float ``[2, C, H, W]``, images as the network is shown them; None for zeros.
    Raises: UserError with the words of whatever the factory, or its network, raises.
    """
    height, side, channels = image_shape
    offered = {"num_classes": num_classes, "in_channels": channels}
    if name in CLASSIFIERS:
        return functools.partial(classifier, name, **offered, width=width, image_size=max(height, side))
    if ":" not in name:
        fail(where, argument, f"be pkg.mod:factory or one of {', '.join(CLASSIFIERS)}", name or "nothing")
    make = factory(where, argument, name, **offered)
    x = torch.zeros(2, channels, height, side) if sample is None else sample
    return takes_logits(where, argument, make, x, num_classes, FACTORY)
