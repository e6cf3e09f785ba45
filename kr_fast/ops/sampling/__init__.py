"""Noise, solver steps, bytes and PNG files."""

from kr_fast.ops.sampling import reference

__all__ = ["reference"]  # importing it registers the family's definitions
