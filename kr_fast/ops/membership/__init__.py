"""Signals, attacks and exact statistics of membership inference."""

from kr_fast.ops.membership import reference

__all__ = ["reference"]  # importing it registers the family's definitions
