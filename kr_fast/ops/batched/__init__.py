"""Ops over many models at once."""

from kr_fast.ops.batched import reference

__all__ = ["reference"]  # importing it registers the family's definitions
