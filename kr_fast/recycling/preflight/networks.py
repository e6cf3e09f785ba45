"""Sizes of a run's networks, from passes on the meta device, which computes and allocates nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kr_fast.models import padded_size, unet
from kr_fast.recycling import given
from kr_fast.recycling.context import Context
from kr_fast.runtime.errors import UserError, first_line

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Size:
    """``parameters``: how many; the rest in bytes: ``state`` of weights and buffers, ``saved`` of what a training step
    keeps of one image until its backward, ``widest`` of the largest output of a layer for one image. ``operations``:
    of one image's forward pass."""

    parameters: int
    state: int
    saved: int
    widest: int
    operations: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the run's networks."""

    teacher: Size
    student: Size
    generator: Size


def sizes(context: Context) -> Sizes:
    """Sizes of all networks of the run, each of which has made one pass.

    Raises: UserError if the UNet cannot be made, or cannot take as few images as the smallest batch has.
    """
    c = context.config
    height, width, channels = context.data.image_shape
    pixels = (channels, height, width)
    made = {"teacher": (c.teacher_arch, c.teacher_width), "student": (c.student_arch, c.student_width)}
    classifiers = {name: _size(_key(context.make_network(*of)), _classify, pixels, 2) for name, of in made.items()}
    if c.generator:  # of which no more is known than its parameters
        parameters = given.opened(c, context.data, context.runtime.device).parameters
        return Sizes(**classifiers, generator=Size(parameters, 4 * parameters, 0, 0, 0))
    levels = len(c.generator_widths)
    padded = (channels, padded_size(height, levels), padded_size(width, levels))
    least = min(c.generator_batch_size // context.runtime.world_size, c.micro_batch, 2)
    from torch import _dynamo  # noqa: F401  (diffusers does so when a UNet is first made; under META torch 2.6 cannot)

    try:
        generator = _size(_key(_generator(context)), _denoise, padded, least)
    except ValueError as error:
        rule = f"make a UNet for images of {height} x {width} in batches of {least} (generator_batch_size, micro_batch)"
        got = f"{list(c.generator_widths)} ({first_line(error)})"
        raise UserError(f"run: generator_widths must {rule}, got {got}") from error
    return Sizes(**classifiers, generator=generator)


def make_generator(context: Context) -> Any:
    """A fresh generator of this run's configuration."""
    return _generator(context)()


def _generator(context: Context) -> functools.partial:
    c, data = context.config, context.data
    return functools.partial(
        unet,
        *data.image_shape,
        data.num_classes,
        widths=c.generator_widths,
        layers=c.generator_layers,
        dropout=c.generator_dropout,
    )


def _key(make: functools.partial) -> tuple:
    return make.func, make.args, tuple(make.keywords.items())


def _classify(network: Any, x: Tensor) -> Tensor:
    return network(x)


def _denoise(network: Any, x: Tensor) -> Tensor:
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return network(x, torch.zeros(len(x), device=x.device), class_labels=labels).sample


@functools.lru_cache(maxsize=16)  # asked for several times before a run, and a second is needed each time
def _size(key: tuple, run: Callable, shape: tuple[int, ...], least: int) -> Size:
    make, arguments, options = key
    with META:
        model = make(*arguments, **dict(options)).train()
    weights = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    saved = {}
    for count in (least, least + 1):
        storages: dict[int, int] = {}

        def keep(value: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            run(model, torch.zeros(count, *shape, device=META))
        saved[count] = sum(storages.values())
    outputs: list[int] = []
    leaves = [part for part in model.modules() if not list(part.children())]
    hooks = [part.register_forward_hook(lambda _, __, y: outputs.append(_bytes(y))) for part in leaves]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, torch.zeros(least, *shape, device=META))
    for hook in hooks:
        hook.remove()
    values = [*model.parameters(), *model.buffers()]
    parameters = sum(value.numel() for value in model.parameters())
    per_image = max(outputs) // least, counter.get_total_flops() // least
    return Size(parameters, sum(map(_bytes, values)), saved[least + 1] - saved[least], *per_image)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
