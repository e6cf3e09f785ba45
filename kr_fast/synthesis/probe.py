"""What a diffusers scheduler's own ``step()`` computes, written as coefficients.

The scheduler runs once on basis vectors: the sample, every model output, every noise tensor and every clamped clean
image is a coordinate of its own, and each tensor is the column of its coordinates. Clamping and drawing are caught on
their way into torch. What the scheduler stores between steps (old outputs, old samples, derivatives) is found in its
attributes; a step is then solved for the fewest of those columns that give its result.
"""

import copy
import dataclasses
import inspect
import numbers
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kr_fast.ops.sampling.solver_step import MAX_HISTORY, SolverRow
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.inputs import as_integer

# Most schedulers are solved to the first; some hold their own constants in float32.
EXACT, SINGLE = 1e-10, 3e-6
MOST_STEPS = 10_000
RAW = 4  # steps back whose raw samples and model outputs may stand in for what the scheduler stores
_CLAMPS = (torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip)
_CASTS = (torch.Tensor.to, torch.Tensor.float)
_DRAWS = (torch.randn, torch.randn_like)

Clamp = Callable[[Tensor], Tensor] | None  # in the place of a scheduler's clamps; None leaves them
Source = tuple[int, str]  # (step, "sample" or "kept"): the sample that went into a step, or what the step kept


class NotLinearError(UserError):
    """A scheduler's step is not of the form that a table can hold."""


class Intercept(TorchFunctionMode):
    """Hand the normal tensors that code draws for ``shape``, and the clamps of such tensors, to functions of ours.

    If ``exact``, such tensors stay in float64 where code casts them to float32, so that coefficients are not rounded.
    """

    def __init__(self, shape: torch.Size, draw: Callable, clamp: Clamp, exact: bool):
        super().__init__()
        self.shape, self.draw, self.clamp, self.exact = shape, draw, clamp, exact

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DRAWS:
            like = args[0] if args else kwargs.get("size", kwargs.get("input"))
            shape = like.shape if isinstance(like, Tensor) else args if isinstance(like, int) else like
            if tuple(shape) == tuple(self.shape):
                return self.draw()
        if self.clamp is not None and func in _CLAMPS and args[0].shape == self.shape:
            bounds = inspect.signature(lambda low=None, high=None: None).bind_partial(*args[1:]).arguments
            low, high = bounds.get("low", kwargs.get("min")), bounds.get("high", kwargs.get("max"))
            return self.clamp(args[0], low, high)
        result = func(*args, **kwargs)
        if self.exact and func in _CASTS and result.dtype == torch.float32 and args[0].dtype == torch.float64:
            return args[0] if args[0].shape == self.shape else result
        return result


class Runner:
    """Fresh copies of a scheduler, set to its steps, and its own step with noise of ours."""

    def __init__(self, scheduler: Any, steps: int, eta: float | None):
        steps = as_integer("StepTable", "num_inference_steps", steps, 1, MOST_STEPS)
        if isinstance(scheduler, type):
            fail("StepTable", "scheduler", f"be an instance, as {scheduler.__name__}() is", scheduler.__name__)
        if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "set_timesteps"):
            fail("StepTable", "scheduler", "have set_timesteps and step", type(scheduler).__name__)
        takes_eta = "eta" in inspect.signature(scheduler.step).parameters
        number = isinstance(eta, numbers.Real) and not isinstance(eta, bool)
        if eta is not None and not (number and 0 <= eta <= 1 and (takes_eta or eta == 0)):
            fail("StepTable", "eta", "be in [0, 1], and 0 or None for a scheduler that does not take it", eta)
        self.arguments = {"eta": eta} if takes_eta and eta is not None else {}
        self.scheduler, self.steps, self.name = scheduler, steps, _named(scheduler)
        variance = getattr(getattr(scheduler, "config", None), "variance_type", None)
        if variance in ("learned", "learned_range") and self.name.startswith("DDPM"):
            rule = "have a fixed variance (variance_type fixed_small or fixed_large): no network's variances are used"
            fail("StepTable", "scheduler", rule, self.name)

    def fresh(self) -> Any:
        """A copy of the scheduler at its first step."""
        scheduler = copy.deepcopy(self.scheduler)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        flow = type(scheduler).__name__.startswith("FlowMatch") and not scheduler.config.get("use_dynamic_shifting")
        if flow and takes_sigmas:
            # As diffusers' own flow pipelines do: the default grid would spend its last step on going from 0.001 to 0.
            scheduler.set_timesteps(sigmas=[1 - k / self.steps for k in range(self.steps)])
        else:
            scheduler.set_timesteps(self.steps)
        return scheduler

    def try_out(self) -> None:
        """The scheduler's own code over a small trajectory of finite outputs, of two images that are the same.

        Raises: UserError with the scheduler's own message, or the step at which it returns NaN or inf by itself, or
            makes two images of one: with noise that is not of the ids, or by what depends on the place in the batch.
        """
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(1, 3, 8, 8, generator=generator).repeat(2, 1, 1, 1)  # noqa: E731
        try:
            scheduler = self.fresh()
            x = draw() * float(getattr(scheduler, "init_noise_sigma", 1.0))
            for step, t in enumerate(scheduler.timesteps):
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = self.step(scheduler, t, x, torch.sin(3 * scaled), draw, exact=False).prev_sample
                if not bool(torch.isfinite(x).all()):
                    rule = "return finite samples for finite outputs"
                    fail(
                        "StepTable", "scheduler", rule, f"{self.name}, whose own step() gives NaN or inf at step {step}"
                    )
                if not torch.allclose(x[0], x[1], rtol=1e-4, atol=1e-5):
                    rule = "draw its noise by torch.randn in the sample's shape, which is then that of the image ids"
                    got = f"{self.name}, whose own step() makes two images of one at step {step}"
                    fail("StepTable", "scheduler", rule, got)
        except UserError:
            raise
        except Exception as error:  # whatever the scheduler's own code raises
            got = f"{self.name}, whose own code fails ({type(error).__name__}: {first_line(error)})"
            raise UserError(f"StepTable: scheduler must run {self.steps} steps, got {got}") from error

    @staticmethod
    def input_scale(scheduler: Any, t: Tensor) -> float:
        """What the scheduler multiplies the network's input by at ``t``."""
        if not hasattr(scheduler, "scale_model_input"):
            return 1.0
        return float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), t).item())

    def step(
        self, scheduler: Any, t: Tensor, x: Tensor, e: Tensor, draw: Callable, clamp: Clamp = None, exact: bool = True
    ) -> Any:
        """One step of the scheduler's own code; ``draw()`` makes its normal tensors."""
        with Intercept(x.shape, draw, clamp, exact), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers' own use of numpy
            return scheduler.step(e, t, x, **self.arguments)


@dataclasses.dataclass
class _Step:
    """Columns of one step: its inputs, its result, and what the scheduler held before and after."""

    scale: float
    x: numpy.ndarray
    e: numpy.ndarray
    y: numpy.ndarray
    z: numpy.ndarray | None
    clean: numpy.ndarray | None
    clean_of: numpy.ndarray | None
    limit: tuple[float, float]  # (largest absolute value, quantile of dynamic thresholding or 0)
    before: list[numpy.ndarray]
    after: list[numpy.ndarray]


def _named(scheduler: Any) -> str:
    """The class, and what its configuration has that is not the class's default."""
    defaults = inspect.signature(type(scheduler).__init__).parameters
    config = getattr(scheduler, "config", {})
    own = [f"{name}={config[name]!r}" for name in defaults if name in config and config[name] != defaults[name].default]
    name = type(scheduler).__name__
    return f"{name}({', '.join(own)})" if own and len(", ".join(own)) <= 200 else name


def record(runner: Runner, weight: float) -> tuple[list[_Step], list[float]]:
    """The scheduler's run on basis vectors, and its timesteps. ``weight`` is the size of the initial sample."""
    scheduler = runner.fresh()
    timesteps = scheduler.timesteps
    count = len(timesteps)
    size = 1 + 3 * count
    scale = numpy.ones(size)
    scale[0] = weight

    def unit(at: int, dtype: torch.dtype = torch.float64) -> Tensor:
        vector = torch.zeros(size, 1, 1, 1, dtype=dtype)
        vector[at] = 1
        return vector

    def column(tensor: Tensor) -> numpy.ndarray:
        return tensor.detach().double().flatten().numpy() * scale

    def stored() -> list[numpy.ndarray]:
        return [column(value) for value in _tensors(vars(scheduler)) if value.shape == (size, 1, 1, 1)]

    steps, x = [], unit(0)
    for i, t in enumerate(timesteps):
        drawn, clamped = [], []

        def draw(i: int = i, drawn: list = drawn) -> Tensor:
            drawn.append(i)
            return unit(1 + count + i)

        def clamp(value: Tensor, low, high, quantile: float = 0.0, i: int = i, clamped: list = clamped) -> Tensor:
            if low is None or high is None or float(low) != -float(high):
                raise NotLinearError(f"clamps its sample to [{low}, {high}]")
            clamped.append((column(value), (float(high), quantile)))
            return unit(1 + 2 * count + i, value.dtype)

        def threshold(value: Tensor, clamp: Callable = clamp) -> Tensor:
            config = scheduler.config
            return clamp(value, -config.sample_max_value, config.sample_max_value, config.dynamic_thresholding_ratio)

        if scheduler.config.get("thresholding", False):
            scheduler._threshold_sample = threshold
        e, before, factor = unit(1 + i), stored(), runner.input_scale(scheduler, t)
        y = runner.step(scheduler, t, x, e, draw, clamp).prev_sample
        if len(drawn) > 1 or len(clamped) > 1:
            raise NotLinearError("draws noise or clamps more than once in a step")
        clean_of, limit = clamped[0] if clamped else (None, (float("inf"), 0.0))
        noise = column(unit(1 + count + i)) if drawn else None
        clean = column(unit(1 + 2 * count + i)) if clamped else None
        columns = (column(x), column(e), column(y), noise, clean, clean_of)
        steps.append(_Step(factor, *columns, limit, before, stored()))
        x = y.double()
    return steps, timesteps.tolist()


def _tensors(values: dict[str, Any]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))


def _solve(target: numpy.ndarray, columns: list[numpy.ndarray], drop: int) -> list[float] | None:
    """Coefficients of ``columns`` that make ``target``, as many zero as can be, tried from the last; None if none do.

    At most the last ``drop`` columns are tried first: those cost memory traffic, the others are read anyway.
    """
    size = numpy.abs(target).max()
    if size == 0:
        return [0.0] * len(columns)
    for tolerance in (EXACT, SINGLE):

        def fit(use: list[int], tolerance: float = tolerance) -> numpy.ndarray | None:
            if not use:
                return None
            matrix = numpy.stack([columns[k] for k in use], 1)
            norms = numpy.linalg.norm(matrix, axis=0)
            matrix = matrix / norms
            weights = numpy.linalg.lstsq(matrix, target, rcond=None)[0]
            close = numpy.abs(matrix @ weights - target).max() <= tolerance * size
            return weights / norms if close else None

        use = [k for k in range(len(columns)) if columns[k].any()]
        weights = fit(use)
        if weights is None:
            continue
        first = len(columns) - drop
        for k in [*range(len(columns) - 1, first - 1, -1), *range(first)]:
            if k in use and (fewer := fit([each for each in use if each != k])) is not None:
                use, weights = [each for each in use if each != k], fewer
        result = [0.0] * len(columns)
        for k, value in zip(use, weights, strict=True):
            result[k] = float(value)
        return result
    return None


@dataclasses.dataclass
class _Held:
    """A tensor that a later step may read: of ``step``, made of its (sample, output, clean image) by ``keep``."""

    step: int
    kind: str
    column: numpy.ndarray
    keep: tuple[float, float, float]
    raw: bool  # not stored by the scheduler, but there


def solve(steps: list[_Step]) -> tuple[list[SolverRow], list[tuple[Source, ...]]]:
    """The row of every step, and where its history comes from."""
    known: list[_Held] = []
    chosen: dict[int, _Held] = {}  # what each step keeps for later ones
    rows, sources = [], []
    for i, step in enumerate(steps):
        if not numpy.isfinite(step.y).all() or (step.clean_of is not None and not numpy.isfinite(step.clean_of).all()):
            raise NotLinearError(f"returns non-finite values at step {i}")
        base = [step.x, step.e, *(column for column in (step.clean, step.z) if column is not None)]
        free = [each for each in known if each.kind == "sample" or chosen.get(each.step, each) is each]
        stored = [each for each in free if not each.raw and any(_same(each.column, other) for other in step.before)]
        near = [each for each in free if each.raw and i - each.step <= RAW]
        # What the scheduler stores is tried before raw samples and outputs, and new before old.
        for held in (stored[: -2 * MAX_HISTORY - 1 : -1], near[::-1]):
            weights = _solve(step.y, base + [each.column for each in held], len(held))
            if weights is not None:
                break
        else:
            raise NotLinearError(f"computes step {i} from more than samples, outputs and noise")
        history = [(each, value) for each, value in zip(held, weights[len(base) :], strict=True) if value != 0.0]
        if len(history) > MAX_HISTORY:
            raise NotLinearError(f"needs {len(history)} earlier tensors at step {i}, of at most {MAX_HISTORY}")
        for each, _ in history:
            if each.kind == "kept" and chosen.setdefault(each.step, each) is not each:
                raise NotLinearError(f"needs two tensors of step {each.step} later on")
        rows.append(_row(step, weights, len(base), tuple(value for _, value in history)))
        sources.append(tuple((each.step, each.kind) for each, _ in history))
        known += _values_of_step(i, step)
    rows = [row._replace(keep=chosen[i].keep) if i in chosen else row for i, row in enumerate(rows)]
    # A row carries the factor of the network input that follows it.
    scales = [step.scale for step in steps[1:]] + [1.0]
    return [row._replace(next_input=scale) for row, scale in zip(rows, scales, strict=True)], sources


def _values_of_step(i: int, step: _Step) -> list[_Held]:
    """What step ``i`` leaves for later ones: its raw tensors, and what the scheduler stored that is made of them."""
    values = [_Held(i, "sample", step.x, (1.0, 0.0, 0.0), True), _Held(i, "kept", step.e, (0.0, 1.0, 0.0), True)]
    parts = [step.x, step.e] + ([step.clean] if step.clean is not None else [])
    for column in step.after:
        if any(_same(column, other) for other in (*step.before, step.y)):
            continue
        if _same(column, step.x):
            values.append(_Held(i, "sample", step.x, (1.0, 0.0, 0.0), False))
        elif (keep := _solve(column, parts, 0)) is not None:
            values.append(_Held(i, "kept", column, tuple((*keep, 0.0)[:3]), False))
    return values


def _same(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    return bool(numpy.abs(a - b).max() <= 1e-7 * max(numpy.abs(a).max(), 1e-30))


def _row(step: _Step, weights: list[float], width: int, history: tuple[float, ...]) -> SolverRow:
    names = ["sample", "model"] + (["x0"] if step.clean is not None else []) + (["noise"] if step.z is not None else [])
    values = dict(zip(names, weights[:width], strict=True))
    if step.clean is not None:
        clean = _solve(step.clean_of, [step.x, step.e], 0)
        if clean is None:
            raise NotLinearError("clamps something else than a sum of its sample and output")
        values.update(x0_sample=clean[0], x0_model=clean[1], clip=step.limit[0], quantile=step.limit[1])
    return SolverRow(history=history, **values)
