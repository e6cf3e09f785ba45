"""Amounts in words for people."""


def duration(seconds: float) -> str:
    """``3.0 s``, ``12.0 min``, ``5.2 h``, ``3.1 days``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
