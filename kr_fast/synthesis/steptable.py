"""A diffusers scheduler compiled to a table of coefficients by probing its own ``step()``.

Nothing of the scheduler is re-implemented: :mod:`.probe` reads the coefficients off its code, and a replay against the
scheduler itself, through a non-linear network, checks every table when it is built.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from kr_fast.ops.sampling.solver_step import SolverRow
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis.probe import NotLinearError, Runner, Source, record, solve

# Linear schedulers replay to 1e-12; 1e-7 is left to those that hold constants of theirs in float32.
REPLAY_TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class StepTable:
    """``rows[i]`` is the :class:`SolverRow` of step ``i`` at ``timesteps[i]``, one for each call of the network.

    ``sources[i]`` names the tensors of ``rows[i].history``: ``(j, "sample")`` is the sample that went into step ``j``,
    ``(j, "kept")`` what step ``j`` kept by its row's ``keep``. ``init_noise_sigma`` scales the initial noise and
    ``input_scales[i]`` the network's input, as the scheduler asks.
    """

    name: str
    timesteps: tuple[float, ...]  # int where the scheduler's are: it is what the network is called with
    rows: tuple[SolverRow, ...]
    sources: tuple[tuple[Source, ...], ...]
    input_scales: tuple[float, ...]
    init_noise_sigma: float
    replay_error: float

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """SHA-256 of all that a trajectory depends on.

        Coefficients count in float32, as kernels read them: their float64 is solved for by LAPACK, whose last bits
        differ between kinds of CPU, and the nodes of a cluster have to agree.
        """
        rows = [(_float32(r.numbers()), len(r.history), r.keep is None, r.quantile) for r in self.rows]
        content = (self.timesteps, rows, self.sources, _float32(self.input_scales), self.init_noise_sigma)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @classmethod
    def compile(cls, scheduler: Any, num_inference_steps: int, *, eta: float | None = None) -> "StepTable":
        """The table of ``scheduler`` for ``num_inference_steps`` steps.

        Args:
            scheduler: a diffusers scheduler; it is not changed.
            num_inference_steps: as in ``scheduler.set_timesteps``; flow-matching schedulers get the sigmas
                ``1, 1 - 1/n, ..., 1/n`` (before their own shift), as diffusers' flow pipelines set them.
            eta: share of noise in [0, 1] (DDIM: Song et al., 2021, eq. 16; TCD's gamma); None for the scheduler's own
                default, and for schedulers that do not take it.
        Raises: NotLinearError if the scheduler is not linear (its replay differs); UserError if its own code refuses
            the probe, or eta is not taken.
        """
        runner = Runner(scheduler, num_inference_steps, eta)
        try:
            return cls._compile(runner)
        except NotLinearError as error:
            kind = type(scheduler).__name__
            raise NotLinearError(f"StepTable: scheduler must be a linear solver, got {kind}, which {error}") from error
        except UserError:
            raise
        except Exception as error:  # whatever the scheduler's own code raises when it is run as a sampler's step
            runner.try_out()  # its own message, if it fails without us
            raise UserError(
                f"StepTable: scheduler must step from (model_output, timestep, sample) of any shape, got "
                f"{type(scheduler).__name__} ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _compile(cls, runner: Runner) -> "StepTable":
        # Flow-matching schedulers start from unit noise and scale nothing, so they lack both attributes.
        sigma = float(getattr(runner.fresh(), "init_noise_sigma", 1.0))
        steps, timesteps = record(runner, sigma)
        rows, sources = solve(steps)
        scales = tuple(step.scale for step in steps)
        name = type(runner.scheduler).__name__
        table = cls(name, tuple(timesteps), tuple(rows), tuple(sources), scales, sigma, 0.0)
        error = _replay_error(runner, table)
        if not error <= REPLAY_TOLERANCE:
            raise NotLinearError(f"replays with relative error {error:.2g}, above {REPLAY_TOLERANCE:g}")
        return dataclasses.replace(table, replay_error=error)


def _float32(values: Sequence[float]) -> list[float]:
    return numpy.asarray(values, numpy.float32).tolist()


class History:
    """The tensors of earlier steps that a table still needs, while a trajectory runs."""

    def __init__(self, table: StepTable):
        self.table = table
        self.last = {key: i for i, keys in enumerate(table.sources) for key in keys}
        self.held: dict[Source, Tensor] = {}

    def read(self, step: int) -> tuple[Tensor, ...]:
        """The history of ``rows[step]``."""
        return tuple(self.held[key] for key in self.table.sources[step])

    def reads(self, step: int, kind: str) -> bool:
        """Whether a later step reads this tensor of ``step``."""
        return (step, kind) in self.last

    def write(self, step: int, sample: Tensor, kept: Tensor | None) -> None:
        """After ``step``: hold what later steps read, let go of what none does."""
        for key, value in (((step, "sample"), sample), ((step, "kept"), kept)):
            if self.last.get(key, -1) > step:
                self.held[key] = value
        for key in [key for key in self.held if self.last[key] <= step]:
            del self.held[key]


def _replay_error(runner: Runner, table: StepTable) -> float:
    """Largest relative difference, over a trajectory with a non-linear network, from the scheduler itself."""
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * table.init_noise_sigma
    scheduler, history, worst = runner.fresh(), History(table), 0.0
    for i, (row, scale, t) in enumerate(zip(table.rows, table.input_scales, scheduler.timesteps, strict=True)):
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        runner.input_scale(scheduler, t)  # some schedulers warn unless asked before each step
        moved = runner.step(scheduler, t, theirs, _network(theirs * scale), lambda noise=noise: noise)
        theirs = moved.prev_sample.double()
        after, kept = _apply(row, ours, _network(ours * scale), history.read(i), noise)
        history.write(i, ours, kept)
        ours = after
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)))
    return worst


def _network(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.3 * x.roll(1, -1)


def _apply(row: SolverRow, x: Tensor, e: Tensor, history: tuple[Tensor, ...], noise: Tensor):
    clean = row.x0_sample * x + row.x0_model * e
    if row.quantile:
        limit = clean.flatten(1).abs().quantile(row.quantile, dim=1).clamp(1, row.clip).view(-1, 1, 1, 1)
        clean = clean.clamp(-limit, limit) / limit
    else:
        clean = clean.clamp(-row.clip, row.clip)
    y = row.sample * x + row.model * e + row.x0 * clean + row.noise * noise
    for coefficient, earlier in zip(row.history, history, strict=True):
        y = y + coefficient * earlier
    if row.keep is None:
        return y, None
    return y, row.keep[0] * x + row.keep[1] * e + row.keep[2] * clean
