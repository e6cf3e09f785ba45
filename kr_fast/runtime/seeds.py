"""Independent random streams from one seed: every random choice is a function of (seed, names) and nothing else.

So a resumed run equals an uninterrupted one: no state of a generator has to be saved.
"""

import hashlib

import torch


def derive(seed: int, *names: object) -> int:
    """A seed in [0, 2^63) from ``seed`` and any names or numbers; stable over versions and machines (SHA-256)."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for shuffles and augmentation in training. Sampling uses ``philox_normal`` and never this."""
    return torch.Generator().manual_seed(derive(seed, *names))
