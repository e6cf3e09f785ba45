"""What a run spends its epsilon on: two trainings, and the class counts where these are neither public nor unused.

Of the target the Teacher may spend ``epsilon_teacher_share`` by itself, the class counts :data:`COUNTS_SHARE`, and the
generator what is left once all are composed, which is more than the rest.
"""

import dataclasses
import math

import numpy as np
import torch

from kr_fast.privacy.noise import words
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.runtime import seeds

COUNTS_SHARE = 0.05
_COINS = 64  # drawn at a time
COUNTS, TEACHER, GENERATOR = "class counts", "teacher", "generator"  # as the ledger names them


@dataclasses.dataclass(frozen=True)
class Spending:
    """One training: ``steps`` Poisson samples at ``sample_rate``, each with Gaussian noise on clipped gradients."""

    steps: int
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float = 0.0


def trainings(config: RecycleConfig, records: int) -> dict[str, Spending]:
    """Steps and sample rates that the options ask for, on so many training images; the noise is not decided yet."""
    batches = {TEACHER: config.teacher_batch_size, GENERATOR: config.generator_batch_size}
    steps = {TEACHER: math.ceil(config.teacher_epochs * records / config.teacher_batch_size)}
    steps[GENERATOR] = config.generator_steps
    return {name: Spending(steps[name], batch / records, float(batch)) for name, batch in batches.items()}


def of(context: Context, name: str) -> Spending:
    """That of a training of the run, as it was recorded."""
    return Spending(**context.result("privacy")["trainings"][name])


def counts_are_read(config: RecycleConfig) -> bool:
    """Whether class counts of the training images decide how often a class is drawn, and are not declared public."""
    return config.label_plan == "train" and config.class_counts == "noised"


def class_counts(context: Context) -> tuple[str, list[int]]:
    """("noised", "public" or "unused", how often each class is drawn)."""
    c, classes = context.config, context.data.num_classes
    if c.label_plan == "balanced":
        return "unused", [1] * classes
    exact = torch.bincount(context.data.train.labels, minlength=classes).tolist()
    if c.class_counts == "public":
        return "public", exact
    seed = None if c.dp_seed < 0 else seeds.derive(c.dp_seed, "class counts")
    noise = discrete_laplace(classes, COUNTS_SHARE * c.epsilon, seed)
    noisy = [max(count + each, 0) for count, each in zip(exact, noise, strict=True)]
    return "noised", noisy if any(noisy) else [1] * classes


def discrete_laplace(count: int, epsilon: float, seed: int | None = None) -> list[int]:
    """Integers with ``P(k)`` in proportion to ``q^|k|``, from the operating system's entropy; ``q`` is exp(-epsilon).

    Added to counts, of which a record changes one by 1, they are (epsilon, 0)-differentially private. Each is the
    difference of two geometric numbers: how often in a row a coin shows heads. So ``q`` is that coin's chance exactly
    (rounded up, which is the side of privacy), and nothing is cut off, as the logarithm of a float would be. Source:
    Ghosh, Roughgarden and Sundararajan, "Universally Utility-Maximizing Privacy Mechanisms", SIAM Journal on Computing
    41, 2012.
    """
    limit = np.uint64(heads(epsilon))

    def in_a_row(number: int) -> int:
        length = 0
        while (shown := words(_COINS, seed, "discrete Laplace", number, length) < limit).all():
            length += _COINS
        return length + int(shown.argmin())

    return [in_a_row(2 * number) - in_a_row(2 * number + 1) for number in range(count)]


def heads(epsilon: float) -> int:
    """Of 2^64 sides, those of a coin that shows heads with a chance of at least exp(-epsilon)."""
    return min(math.ceil(math.nextafter(math.exp(-epsilon), 1.0) * 2.0**64), 2**64 - 1)
