"""Whether models are M copies of one architecture, and the first module in which they differ."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from kr_fast.ensemble.networks import check_sizes, device_of, made
from kr_fast.runtime.errors import fail

PLAIN = (bool, int, str, tuple, type(None))  # a float may differ: it is a number of the model, as its weights are


def as_modules(
    where: str, models: Sequence[nn.Module | Mapping[str, Tensor]], make_model: Callable | None
) -> list[nn.Module]:
    """Modules in eval mode; state dicts are loaded into fresh ones of ``make_model``. ``where`` begins the errors."""
    if isinstance(models, nn.Module | Mapping) and not isinstance(models, nn.ModuleList):
        fail(where, "models", "be a list of modules or state dicts", f"one {type(models).__name__} ([model])")
    if isinstance(models, str | bytes) or not isinstance(models, Iterable):
        fail(where, "models", "be a list of modules or state dicts", type(models).__name__)
    models = list(models)
    if len(models) == 0:
        fail(where, "models", "hold at least one model", 0)
    modules = []
    for index, model in enumerate(models):
        if isinstance(model, Mapping):
            if make_model is None:
                fail(where, "make_model", "be given for models that are state dicts", None)
            state, model = model, made(where, "make_model", make_model)
            if modules:  # names the first difference; load_state_dict prints a list
                Comparison(where).states(modules[0].state_dict(), state, index)
            try:
                model.load_state_dict(state)
            except (RuntimeError, TypeError, AttributeError) as error:
                fail(where, "models", "fit make_model", f"for model {index}: {' '.join(str(error).split())}")
        elif not isinstance(model, nn.Module):
            fail(where, "models", "hold modules or state dicts", type(model).__name__)
        check_sizes(where, f"model {index}", model)
        modules.append(model.eval())
    return modules


def dense(value: Tensor) -> Tensor:
    """``value``, of whatever layout, as a tensor that every function takes."""
    return value if value.layout == torch.strided else value.to_dense()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Refusals of models that differ, which begin with ``where`` and end in ``note``. Raises: UserError."""

    where: str
    note: str = ""

    def models(self, models: Sequence[nn.Module]) -> None:
        """Models that are not of one architecture, on one device, or that hold a weight that is not finite."""
        first = models[0]
        state, parts = first.state_dict(), _description(first)
        for index, model in enumerate(models):
            self.states(state, model.state_dict(), index)
            if index:
                self._parts(parts, _description(model), index)
            if (device := device_of(model)) != device_of(first):
                self._refuse(f"device {device_of(first)} in model 0 and {device} and {index}")

    def pair(self, first: nn.Module, other: nn.Module, index: int) -> None:
        """Model ``index`` if it is not of the architecture of the first."""
        self.states(first.state_dict(), other.state_dict(), index)
        self._parts(_description(first), _description(other), index)

    def states(self, first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
        """Other names, shapes or dtypes, or numbers that are not finite."""
        if list(first) != list(other):
            names = [name for name in (*first, *other) if (name in first) != (name in other)]
            name = names[0] if names else "order of parameters"
            self._refuse(f"{name} in only one of models 0 and {index}")
        for name, value in other.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape != first[name].shape:
                self._refuse(f"{name} {list(first[name].shape)} and {list(value.shape)} in 0 and {index}")
            if value.dtype != first[name].dtype:
                self._refuse(f"{name} {first[name].dtype} and {value.dtype} in 0 and {index}")
            if value.dtype.is_floating_point and not bool(torch.isfinite(dense(value)).all()):
                fail(self.where, "weights", "be finite", f"{name} of model {index} with NaN or inf{self.note}")

    def _parts(self, first: dict, other: dict, index: int) -> None:
        for name, (kind, options, attributes) in other.items():
            shown = name or "the model"
            if name not in first:
                self._refuse(f"{shown} in only one of models 0 and {index}")
            own_kind, own_options, own = first[name]
            if kind is not own_kind or options != own_options:
                own_text, text = f"{own_kind.__name__}({own_options})", f"{kind.__name__}({options})"
                self._refuse(f"{shown} {own_text} and {text} in 0 and {index}")
            for key, value in attributes.items():
                if own.get(key) != value:
                    self._refuse(f"{shown} with {key} {own.get(key)} and {value} in 0 and {index}")
        for name in first:
            if name not in other:
                self._refuse(f"{name} in only one of models 0 and {index}")

    def _refuse(self, what: str) -> NoReturn:
        fail(self.where, "models", "share one architecture", what + self.note)


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


def _kind(part: nn.Module) -> type:
    """The class, but for those that torch makes anew for each object."""
    return fx.GraphModule if isinstance(part, fx.GraphModule) else type_before_parametrizations(part)
