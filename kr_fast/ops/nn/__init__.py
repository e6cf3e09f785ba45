"""Normalisation, attention and convolution."""

from kr_fast.ops.nn import reference

__all__ = ["reference"]  # importing it registers the family's definitions
