"""Knowledge Recycling end to end: Teacher, generator, checkpoint choice, tuning, distillation, audit, report."""

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import recycle
from kr_fast.recycling.several_seeds import recycle_seeds

__all__ = ["RecycleConfig", "recycle", "recycle_seeds"]
