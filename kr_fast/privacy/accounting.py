"""What private mechanisms spend together, and the noise for a target: privacy loss distributions by ``dp-accounting``.

The neighbouring relation is "add or remove one record". Losses are rounded to a grid so that every epsilon is an upper
bound: Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", PETS 2022.
"""

import functools
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_integer

logger = logging.getLogger("kr_fast")
GRID = 1e-4  # of privacy losses; dp-accounting's own default, so that its users get the same figures
_SEARCH_GRID = 1e-3  # where the noise is only bracketed
_ROUGH_GRID, _ROUGH = 1e-2, 100.0  # epsilons above _ROUGH, which protect nobody, take a coarser grid than memory allows
_LEAST_NOISE, _MOST_NOISE = 0.1, 1000.0
_LEAST_DELTA = 1e-12  # dp-accounting drops tails of 1e-15 at each composition and counts them as lost
_NOISE_DIGITS = 4


@dataclass(frozen=True)
class Gaussian:
    """``steps`` sums with Gaussian noise, each over records drawn anew by Poisson sampling; DP-SGD is this.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 norm to which each record's part is clipped.
        sample_rate: chance of a record to be in a step, independently of all others; 1: all are in.
        steps: how often.
    Raises: UserError naming the argument.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        _number("Gaussian", "noise_multiplier", self.noise_multiplier, _LEAST_NOISE, _MOST_NOISE)
        _check_rate("Gaussian", self.sample_rate)
        as_integer("Gaussian", "steps", self.steps, 0)

    def loss(self, grid: float) -> Any:
        """Privacy loss distribution of one step, losses in multiples of ``grid``."""
        return _library().from_gaussian_mechanism(
            self.noise_multiplier, sampling_prob=self.sample_rate, value_discretization_interval=grid
        )


@dataclass(frozen=True)
class Laplace:
    """``steps`` times Laplace noise, on counts for one.

    What is accounted for is exact noise: that of floats, as ``numpy.random.laplace`` makes it, tells by its low bits
    what it was added to (Mironov, CCS 2012). Whole numbers take the discrete one.

    Args:
        noise_multiplier: scale of the noise over the L1 norm of what one record adds; counts by class: the scale.
        steps: how often.
    Raises: UserError naming the argument.
    """

    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        _number("Laplace", "noise_multiplier", self.noise_multiplier, 0.01, math.inf)
        as_integer("Laplace", "steps", self.steps, 0)

    def loss(self, grid: float) -> Any:
        """As :meth:`Gaussian.loss`, by ``grid``."""
        return _library().from_laplace_mechanism(self.noise_multiplier, value_discretization_interval=grid)


@dataclass(frozen=True)
class PureDP:
    """``steps`` times any mechanism that is ``(epsilon, 0)``-DP: the exponential mechanism, report noisy max.

    Args:
        epsilon: of one use.
        steps: how often.
    Raises: UserError naming the argument.
    """

    epsilon: float
    steps: int = 1

    def __post_init__(self) -> None:
        _number("PureDP", "epsilon", self.epsilon, 0.0, _ROUGH)
        as_integer("PureDP", "steps", self.steps, 0)

    def loss(self, grid: float) -> Any:
        """As :meth:`Gaussian.loss`, by ``grid``: the least private mechanism there is for this epsilon."""
        from dp_accounting.pld import common

        parameters = common.DifferentialPrivacyParameters(float(self.epsilon), 0.0)
        return _library().from_privacy_parameters(parameters, value_discretization_interval=grid)


Mechanism = Gaussian | Laplace | PureDP


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon at ``delta`` of all ``mechanisms`` on the same records together; each may depend on those before it.

    An upper bound, near the true value: at most 0.1 % above it in the regimes of tests/privacy. Computed on a coarser
    grid where it is above 100.

    Args:
        mechanisms: :class:`Gaussian`, :class:`Laplace` or :class:`PureDP`; none: 0.
        delta: in [1e-12, 1).
    Raises: UserError naming the argument, or that dp-accounting is missing.
    """
    _check_delta("epsilon_of", delta)
    rough = _epsilon(mechanisms, delta, _ROUGH_GRID)
    return rough if rough > _ROUGH else _epsilon(mechanisms, delta, GRID)


def calibrate(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, beside: Sequence[Mechanism] = ()
) -> float:
    """The least noise multiplier with which ``steps`` steps of DP-SGD and what is ``beside`` them keep to ``epsilon``.

    Rounded up to four decimals, at least 0.1. To share a budget, calibrate the first training to its part of epsilon,
    and the last one to the whole with the others ``beside``: so nothing is left over.

    Args:
        epsilon: of everything together, above 0.
        delta: in [1e-12, 1); below 1 / records, see :func:`check_target`.
        sample_rate: chance of a record to be in a step, in (0, 1].
        steps: number of steps.
        beside: mechanisms on the same records that the same epsilon pays for.
    Raises: UserError naming the argument, what would reach the target, or that dp-accounting is missing.
    """
    where = "calibrate"
    _check_epsilon(where, epsilon)
    _check_delta(where, delta)
    _check_rate(where, sample_rate)
    as_integer(where, "steps", steps, 1)
    if beside and (spent := epsilon_of(beside, delta)) >= epsilon:
        fail(where, "epsilon", f"be above {spent:.4g}, which what is beside the training spends alone", epsilon)

    search, fine = (_ROUGH_GRID, _ROUGH_GRID) if epsilon > _ROUGH else (_SEARCH_GRID, GRID)

    @functools.cache
    def excess(noise: float, grid: float = search) -> float:
        """Logarithm of what is spent over the target: nearly a straight line in the logarithm of the noise."""
        spent = _epsilon([*beside, Gaussian(noise, sample_rate, steps)], delta, grid)
        return math.log(max(spent, 1e-300) / epsilon)

    low = high = 1.0
    while excess(high) > 0 and high < _MOST_NOISE:
        low, high = high, min(3 * high, _MOST_NOISE)
    while excess(low) <= 0:
        if low == _LEAST_NOISE:
            return low
        low, high = max(low / 3, _LEAST_NOISE), low
    if high == _MOST_NOISE and excess(high, fine) > 0:
        _refuse_target(where, epsilon, delta, sample_rate, steps, beside)
    noise = _root(excess, low, high, 1e-3)
    low, high = max(0.995 * noise, _LEAST_NOISE), noise
    while excess(high, fine) > 0:
        low, high = high, min(1.005 * high, _MOST_NOISE)
    while low < high and excess(low, fine) <= 0:
        low, high = max(0.99 * low, _LEAST_NOISE), low
    noise = _root(lambda each: excess(each, fine), low, high, 0.5 * 10**-_NOISE_DIGITS)
    noise = math.ceil(noise * 10**_NOISE_DIGITS) / 10**_NOISE_DIGITS
    while excess(noise, fine) > 0:
        noise = round(noise + 10**-_NOISE_DIGITS, _NOISE_DIGITS)
    return noise


def check_target(where: str, epsilon: float, delta: float, records: int | None) -> None:
    """Refuse a target that says nothing; warn, by the logger ``kr_fast``, of a delta above ``1 / records``.

    Args:
        where: the op, for the error.
        epsilon: above 0.
        delta: in [1e-12, 1).
        records: how many there are; None where nobody knows, which is refused: no sampling rate is known then.
    Raises: UserError naming the argument.
    """
    _check_epsilon(where, epsilon)
    _check_delta(where, delta)
    if records is None:
        rule = "be known before a private training: its sampling rate is that of a batch to all records"
        fail(where, "the number of records", f"{rule}; give data with a length", "data of unknown size")
    if delta * as_integer(where, "records", records, 1) > 1:
        words = "delta %g is above 1 / records = %.2g: publishing each record with chance delta would satisfy it"
        logger.warning(f"{where}: {words}; take one well below", delta, 1 / records)


def check_library() -> None:
    """Refuse to go on where dp-accounting is missing. Raises: UserError with the mend."""
    _library()


def _epsilon(mechanisms: Sequence[Mechanism], delta: float, grid: float) -> float:
    total = _library().identity(value_discretization_interval=grid)
    for each in mechanisms:
        if each.steps:
            total = total.compose(each.loss(grid).self_compose(each.steps))
    return float(total.get_epsilon_for_delta(delta))


def _root(excess: Callable[[float], float], low: float, high: float, error: float) -> float:
    """Noise between ``low`` and ``high`` at which ``excess`` is 0; ``high`` where it is above 0 there too."""
    from scipy.optimize import brentq

    return high if low == high or excess(high) > 0 else float(brentq(excess, low, high, xtol=error))


def _refuse_target(
    where: str, epsilon: float, delta: float, sample_rate: float, steps: int, beside: Sequence[Mechanism]
) -> None:
    """Say what would reach the target at the most noise that is allowed."""

    def spent(count: int) -> float:
        return epsilon_of([*beside, Gaussian(_MOST_NOISE, sample_rate, count)], delta)

    fits, too_many = 0, steps
    while too_many - fits > max(1, fits // 100):
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if spent(middle) <= epsilon else (fits, middle)
    least = math.ceil(spent(steps) * 1e4) / 1e4
    ways = f"at least {least:.4f} for {steps} steps at sample rate {sample_rate:g}, or the steps at most {fits}"
    fail(where, "epsilon", f"be {ways} (noise multiplier {_MOST_NOISE:g})", epsilon)


def _library() -> Any:
    """dp-accounting's functions that make privacy loss distributions."""
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        mend = "pip install 'kr-fast[privacy]'"
        raise UserError(f"privacy: accounting must have dp-accounting installed, got none; {mend}") from error
    return privacy_loss_distribution


def _number(where: str, name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        fail(where, name, f"be a number in [{low:g}, {high:g}]", value)


def _check_epsilon(where: str, epsilon: float) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real) or not 0 < epsilon < math.inf:
        fail(where, "epsilon", "be a finite number above 0", epsilon)


def _check_delta(where: str, delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, numbers.Real) or not _LEAST_DELTA <= delta < 1:
        fail(where, "delta", f"be in [{_LEAST_DELTA:g}, 1)", delta)


def _check_rate(where: str, sample_rate: float) -> None:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, numbers.Real) or not 0 < sample_rate <= 1:
        fail(where, "sample_rate", "be in (0, 1]", sample_rate)
