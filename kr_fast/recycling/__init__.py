"""Knowledge Recycling end to end: Teacher, generator, checkpoint choice, tuning, distillation, audit, report.

What runs a pipeline is loaded on first use: the help of a command needs the options alone.
"""

import importlib
from typing import TYPE_CHECKING

from kr_fast.recycling.config import RecycleConfig as RecycleConfig

if TYPE_CHECKING:
    from kr_fast.recycling.pipeline import distil as distil
    from kr_fast.recycling.pipeline import recycle as recycle
    from kr_fast.recycling.pipeline import train_generator as train_generator
    from kr_fast.recycling.several_seeds import recycle_seeds as recycle_seeds
else:
    _PUBLIC = {"distil": "pipeline", "recycle": "pipeline", "train_generator": "pipeline"}
    _PUBLIC["recycle_seeds"] = "several_seeds"
    __all__ = ["RecycleConfig", *sorted(_PUBLIC)]

    def __getattr__(name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'kr_fast.recycling' has no attribute {name!r}")
        return getattr(importlib.import_module(f"kr_fast.recycling.{_PUBLIC[name]}"), name)
