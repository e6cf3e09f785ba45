"""Short ``repr`` of objects that hold tensors: names, shapes and dtypes, and no numbers."""

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.runtime.inputs import described

MOST = 60  # letters of a value


def short(value: Any) -> str:
    """A tensor or array by dtype and shape, a mapping by its keys, anything else cut to a few words."""
    if isinstance(value, Tensor | np.ndarray):
        return described(value)
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {short(each)}" for key, each in list(value.items())[:4])
        return f"{{{inside}{', ...' if len(value) > 4 else ''}}}"
    text = repr(value)
    return text if len(text) <= MOST or isinstance(value, ShortRepr) else f"{text[: MOST - 3]}..."


class ShortRepr:
    """A dataclass (of ``repr=False``) that prints in a line or two whatever it holds."""

    def __repr__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        inside = ", ".join(f"{field.name}={short(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__name__}({inside})"
