"""Losses and metrics of knowledge distillation."""

from kr_fast.ops.distillation import reference

__all__ = ["reference"]  # importing it registers the family's definitions
