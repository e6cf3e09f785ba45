"""Knowledge Recycling end to end: Teacher, generator, checkpoint choice, tuning, distillation, audit, report."""

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import distil, recycle, train_generator
from kr_fast.recycling.several_seeds import recycle_seeds

__all__ = ["RecycleConfig", "distil", "recycle", "recycle_seeds", "train_generator"]
