"""A diffusers scheduler compiled to a table of coefficients by probing its own ``step()``.

A memoryless scheduler's step is linear in (sample, model output, noise) but for the clamp of the predicted clean image.
So its code is run once on basis vectors and the coefficients are read off; nothing is re-implemented, and a replay
against the scheduler itself checks every table when it is built.
"""

import copy
import dataclasses
import hashlib
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from kr_fast.ops.solver_step import SolverRow
from kr_fast.runtime.errors import UserError, fail

# Schedulers that compute in float32 whatever they are given replay to about 1e-7.
REPLAY_TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class StepTable:
    """``rows[i]`` is the :class:`SolverRow` of step ``i`` at ``timesteps[i]``.

    ``init_noise_sigma`` scales the initial noise and ``input_scales[i]`` the network's input, as the scheduler asks.
    """

    name: str
    timesteps: tuple[float, ...]  # int where the scheduler's are: it is what the network is called with
    rows: tuple[SolverRow, ...]
    input_scales: tuple[float, ...]
    init_noise_sigma: float
    replay_error: float

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """SHA-256 of all that a trajectory depends on."""
        content = (self.timesteps, self.rows, self.input_scales, self.init_noise_sigma)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @classmethod
    def compile(cls, scheduler: Any, num_inference_steps: int, *, eta: float = 0.0) -> "StepTable":
        """The table of ``scheduler`` for ``num_inference_steps`` steps.

        Args:
            scheduler: a diffusers scheduler; it is not changed.
            num_inference_steps: as in ``scheduler.set_timesteps``; flow-matching schedulers get the sigmas
                ``1, 1 - 1/n, ..., 1/n`` (before their own shift), as diffusers' flow pipelines set them.
            eta: DDIM's noise share in [0, 1] (Song et al., 2021, eq. 16); only for schedulers that take it.
        Raises: UserError if the scheduler keeps a history or is not linear (its replay differs), its own code refuses
            the probe, or eta is not taken.
        """
        try:
            return cls._compile(scheduler, num_inference_steps, eta)
        except UserError:
            raise
        except Exception as error:  # whatever the scheduler's own code raises when it is run as a sampler's step
            raise UserError(
                f"StepTable: scheduler must step from (model_output, timestep, sample) of any shape, got "
                f"{type(scheduler).__name__} ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _compile(cls, scheduler: Any, num_inference_steps: int, eta: float) -> "StepTable":
        probe = _Probe(scheduler, num_inference_steps, eta)
        rows, scales = probe.rows()
        # Flow-matching schedulers start from unit noise and scale nothing, so they lack both attributes.
        sigma = float(getattr(probe.fresh(), "init_noise_sigma", 1.0))
        timesteps = tuple(probe.fresh().timesteps.tolist())
        table = cls(type(scheduler).__name__, timesteps, rows, scales, sigma, 0.0)
        error = probe.replay_error(table)
        if not error <= REPLAY_TOLERANCE:
            fail(
                "StepTable", "scheduler", "be a memoryless linear solver whose table replays to "
                f"{REPLAY_TOLERANCE:g}", f"{table.name} with relative error {error:.2g}",
            )  # fmt: skip
        return dataclasses.replace(table, replay_error=error)


class _Probe:
    def __init__(self, scheduler: Any, steps: int, eta: float):
        if not 1 <= steps <= 10_000:
            fail("StepTable", "num_inference_steps", "be in [1, 10000]", steps)
        parameters = inspect.signature(scheduler.step).parameters
        if eta != 0.0 and ("eta" not in parameters or not 0 <= eta <= 1):
            fail("StepTable", "eta", "be in [0, 1], and 0 for a scheduler that does not take it", eta)
        self.arguments = {"eta": eta} if "eta" in parameters else {}
        self.scheduler, self.steps = scheduler, steps
        self.clips = bool(scheduler.config.get("clip_sample", False))
        if scheduler.config.get("thresholding", False):
            fail("StepTable", "scheduler", "not use dynamic thresholding", type(scheduler).__name__)

    def fresh(self, **config: Any) -> Any:
        """A copy of the scheduler at its first step."""
        scheduler = copy.deepcopy(self.scheduler)
        if config:
            scheduler.register_to_config(**config)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        flow = type(scheduler).__name__.startswith("FlowMatch") and not scheduler.config.get("use_dynamic_shifting")
        if flow and takes_sigmas:
            # As diffusers' own flow pipelines do: the default grid would spend its last step on going from 0.001 to 0.
            scheduler.set_timesteps(sigmas=[1 - k / self.steps for k in range(self.steps)])
        else:
            scheduler.set_timesteps(self.steps)
        return scheduler

    @staticmethod
    def input_scale(scheduler: Any, t: Tensor) -> float:
        """What the scheduler multiplies the network's input by at ``t``."""
        if not hasattr(scheduler, "scale_model_input"):
            return 1.0
        return float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), t).item())

    def step(self, scheduler: Any, t: Tensor, x: Tensor, e: Tensor, noise: Tensor) -> Any:
        """One step of the scheduler's own code, with ``noise`` wherever it draws a normal tensor."""
        module = sys.modules[type(scheduler).__module__]
        drawn = getattr(module, "randn_tensor", None)
        if drawn is None:
            return scheduler.step(e, t, x, **self.arguments)
        module.randn_tensor = lambda *_, **__: noise
        try:
            return scheduler.step(e, t, x, **self.arguments)
        finally:
            module.randn_tensor = drawn

    def coefficients(self, **config: Any) -> list[tuple[list[float], list[float] | None, float]]:
        """Per step: (sample, model, noise) coefficients of prev_sample and of pred_original_sample, and input scale."""
        scheduler = self.fresh(**config)
        x, e, z = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1, 1).unbind(0)
        found = []
        for t in scheduler.timesteps:
            scale = self.input_scale(scheduler, t)
            out = self.step(scheduler, t, x, e, z)
            clean = getattr(out, "pred_original_sample", None)
            flat = None if clean is None else clean.flatten().tolist()
            found.append((out.prev_sample.flatten().tolist(), flat, scale))
        return found

    def rows(self) -> tuple[tuple[SolverRow, ...], tuple[float, ...]]:
        rows, scales = [], []
        if self.clips:
            limit = float(self.scheduler.config.get("clip_sample_range", 1.0))
            # Range 1e30 never clips and range 0 makes the clean image vanish: the difference is its coefficient.
            free, none = self.coefficients(clip_sample_range=1e30), self.coefficients(clip_sample_range=0.0)
            for (full, clean, scale), (rest, _, _) in zip(free, none, strict=True):
                widest = max(range(2), key=lambda k: abs(clean[k]))
                x0 = (full[widest] - rest[widest]) / clean[widest]
                rows.append(SolverRow(clean[0], clean[1], limit, rest[0], rest[1], x0, full[2], scale))
                scales.append(scale)
        else:
            for full, _, scale in self.coefficients():
                rows.append(SolverRow(sample=full[0], model=full[1], noise=full[2], next_input=scale))
                scales.append(scale)
        # A row carries the factor of the input that follows it.
        following = [*scales[1:], 1.0]
        rows = [row._replace(next_input=scale) for row, scale in zip(rows, following, strict=True)]
        return tuple(rows), tuple(scales)

    def replay_error(self, table: StepTable) -> float:
        """Largest relative difference, over a trajectory with a non-linear network, from the scheduler itself."""
        generator = torch.Generator().manual_seed(0)
        ours = theirs = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * table.init_noise_sigma
        scheduler, worst = self.fresh(), 0.0
        for row, scale, t in zip(table.rows, table.input_scales, scheduler.timesteps, strict=True):
            noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
            self.input_scale(scheduler, t)  # some schedulers warn unless asked before each step
            moved = self.step(scheduler, t, theirs, _network(theirs * scale), noise).prev_sample
            theirs = moved.double()
            ours = _apply(row, ours, _network(ours * scale), noise)
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)))
        return worst


def _network(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.3 * x.roll(1, -1)


def _apply(row: SolverRow, x: Tensor, e: Tensor, noise: Tensor) -> Tensor:
    clean = (row.x0_sample * x + row.x0_model * e).clamp(-row.clip, row.clip)
    return row.sample * x + row.model * e + row.x0 * clean + row.noise * noise
