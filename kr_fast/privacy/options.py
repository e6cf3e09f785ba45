"""Checks that the package's functions share."""

import math
import numbers
from typing import Any

from kr_fast.runtime.errors import fail


def whole(where: str, name: str, value: Any, low: int) -> int:
    """``value`` as an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        fail(where, name, f"be a whole number of at least {low}", value)
    return int(value)


def number(where: str, name: str, value: Any, low: float = 0.0) -> float:
    """``value`` as a finite float of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (low <= value < math.inf):
        fail(where, name, f"be a finite number of at least {low:g}", value)
    return float(value)


def check_seed(where: str, seed: int | None, not_private: bool) -> int | None:
    """``seed``, which nobody gives by mistake."""
    if not isinstance(not_private, bool):
        fail(where, "not_private", "be a bool", not_private)
    if seed is None:
        if not_private:
            fail(where, "not_private", "be left out where there is no seed", not_private)
        return None
    if not not_private:
        rule = "be left out: who knows it can subtract the noise (a test that needs one says not_private=True)"
        fail(where, "seed", rule, seed)
    return whole(where, "seed", seed, 0)
