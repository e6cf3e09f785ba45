"""Stores that round, for kernels of any op."""

import triton
import triton.language as tl


@triton.jit
def store(to, at, value, mask, ROUND: tl.constexpr):
    """``value`` (float32) in the pointer's dtype, rounded to nearest even; ``ROUND``: to bfloat16, in integers."""
    if ROUND:  # what the interpreter does by itself is to cut off
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(to + at, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(to + at, value.to(to.dtype.element_ty), mask=mask)
