"""What ``kr-fast bench`` measures besides synthesis: per kind a list of cases, each with its providers.

``bench/`` takes the same cases, as pytest-benchmark's.
"""

from collections.abc import Callable

from kr_fast.benchmarks.case import Case


def of(kind: str, device: str) -> list[Case]:
    """The cases of one kind (``loss``, ``training``, ``privacy``, ``models``, ``audit``) on ``cpu`` or ``cuda``."""
    from kr_fast.benchmarks.cases import audit, loss, models, privacy, training

    kinds: dict[str, Callable[[str], list[Case]]] = {
        "loss": loss.cases,
        "training": training.cases,
        "privacy": privacy.cases,
        "models": models.cases,
        "audit": audit.cases,
    }
    return kinds[kind](device)
