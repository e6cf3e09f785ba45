"""Knowledge Recycling end to end: Teacher, generator, checkpoint choice, tuning, distillation, audit, report."""

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import recycle

__all__ = ["RecycleConfig", "recycle"]
