"""Whether models are M copies of one architecture, and the first module in which they differ."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from kr_fast.ensemble.networks import check_sizes, device_of, made
from kr_fast.runtime.errors import UserError, fail

PLAIN = (bool, int, str, tuple, type(None))  # a float may differ: it is a number of the model, as its weights are


def as_modules(models: Sequence[nn.Module | Mapping[str, Tensor]], make_model: Callable | None) -> list[nn.Module]:
    """Modules in eval mode; state dicts are loaded into fresh ones of ``make_model``."""
    if isinstance(models, nn.Module | Mapping) and not isinstance(models, nn.ModuleList):
        fail("ModelArray", "models", "be a list of modules or state dicts", f"one {type(models).__name__} ([model])")
    if isinstance(models, str | bytes) or not isinstance(models, Iterable):
        fail("ModelArray", "models", "be a list of modules or state dicts", type(models).__name__)
    models = list(models)
    if len(models) == 0:
        fail("ModelArray", "models", "hold at least one model", 0)
    found = []
    for index, model in enumerate(models):
        if isinstance(model, Mapping):
            if make_model is None:
                fail("ModelArray", "make_model", "be given for models that are state dicts", None)
            state, model = model, made("ModelArray", "make_model", make_model)
            if found:  # names the first difference; load_state_dict prints a list
                compare_states(found[0].state_dict(), state, index)
            try:
                model.load_state_dict(state)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise UserError(
                    f"ModelArray: models must fit make_model, got for model {index}: {' '.join(str(error).split())}"
                ) from error
        elif not isinstance(model, nn.Module):
            fail("ModelArray", "models", "hold modules or state dicts", type(model).__name__)
        check_sizes("ModelArray", f"model {index}", model)
        found.append(model.eval())
    return found


def check_same(models: Sequence[nn.Module]) -> None:
    """Refuse models that are not of one architecture, on one device, or that hold a weight that is not finite."""
    first = models[0]
    state, parts = first.state_dict(), _description(first)
    for index, model in enumerate(models):
        compare_states(state, model.state_dict(), index)
        if index:
            _compare_parts(parts, _description(model), index)
        if (device := device_of(model)) != device_of(first):
            _refuse(f"device {device_of(first)} in model 0 and {device}", index)


def compare_models(first: nn.Module, other: nn.Module, index: int) -> None:
    """Refuse model ``index`` if it is not of the architecture of the first. Raises: UserError naming the difference."""
    compare_states(first.state_dict(), other.state_dict(), index)
    _compare_parts(_description(first), _description(other), index)


def compare_states(first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    """Same names, shapes and dtypes, and finite numbers."""
    if list(first) != list(other):
        names = [name for name in (*first, *other) if (name in first) != (name in other)]
        name = names[0] if names else "order of parameters"
        raise UserError(
            f"ModelArray: models must share one architecture, got {name} in only one of models 0 and {index}"
        )
    for name, value in other.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape != first[name].shape:
            _refuse(f"{name} {list(first[name].shape)} and {list(value.shape)}", index, "in 0 and")
        if value.dtype != first[name].dtype:
            _refuse(f"{name} {first[name].dtype} and {value.dtype}", index, "in 0 and")
        if value.dtype.is_floating_point and not bool(torch.isfinite(dense(value)).all()):
            raise UserError(f"ModelArray: weights must be finite, got {name} of model {index} with NaN or inf")


def _description(model: nn.Module) -> dict[str, tuple[type, str, dict]]:
    """Name -> class, options as printed, and plain attributes (a stride that forward reads)."""
    return {
        name: (
            _kind(part),
            part.extra_repr(),
            {k: v for k, v in vars(part).items() if k[:1] != "_" and k != "training" and isinstance(v, PLAIN)},
        )
        for name, part in model.named_modules()
    }


def dense(value: Tensor) -> Tensor:
    """``value``, of whatever layout, as a tensor that every function takes."""
    return value if value.layout == torch.strided else value.to_dense()


def _kind(part: nn.Module) -> type:
    """The class, but for those that torch makes anew for each object."""
    return fx.GraphModule if isinstance(part, fx.GraphModule) else type_before_parametrizations(part)


def _compare_parts(first: dict, other: dict, index: int) -> None:
    for name, (kind, options, attributes) in other.items():
        if name not in first:
            _refuse(f"{name or 'the model'} in only one of models 0", index)
        before = first[name]
        if kind is not before[0] or options != before[1]:
            _refuse(f"{name or 'the model'} {before[0].__name__}({before[1]}) and {kind.__name__}({options})", index)
        for key, value in attributes.items():
            if before[2].get(key) != value:
                _refuse(f"{name or 'the model'} with {key} {before[2].get(key)} and {value}", index)
    for name in first:
        if name not in other:
            _refuse(f"{name} in only one of models 0", index)


def _refuse(what: str, index: int, joint: str = "in 0 and") -> NoReturn:
    joint = "and" if what.endswith(("models 0", "model 0")) else joint
    raise UserError(f"ModelArray: models must share one architecture, got {what} {joint} {index}")
