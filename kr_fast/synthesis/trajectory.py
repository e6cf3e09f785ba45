"""From ids and labels to the last sample of a trajectory: by a step table, or by the scheduler's own code."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.ops.sampling.solver_step import SolverOutput, solver_step
from kr_fast.runtime.errors import fail
from kr_fast.synthesis.networks import Network
from kr_fast.synthesis.probe import Runner
from kr_fast.synthesis.steptable import History, StepTable

# Streams of the noise: 0 for the initial sample, 1 + step for a step; a further draw in one step is this much on.
NEXT_DRAW = 1 << 20


class NonFiniteError(Exception):
    """The network returned NaN or inf at ``step``."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


def guided(interval: Sequence[float], step: int, steps: int) -> bool:
    """Whether guidance in the ``interval``, shares of a trajectory, applies at ``step``."""
    return interval[0] <= step / steps < interval[1]


def check_interval(op: str, name: str, interval: Sequence[float], steps: int) -> None:
    """Raises: UserError for an ``interval`` that holds none of the steps: guidance would be off."""
    if not any(guided(interval, step, steps) for step in range(steps)):
        nearest = min(range(steps), key=lambda step: max(interval[0] - step / steps, step / steps - interval[1]))
        rule = f"hold one of the {steps} solver steps, the nearest of which is at {nearest} / {steps}"
        fail(op, name, rule, list(interval))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a trajectory depends on besides its network and solver; see :class:`kr_fast.Sampler`."""

    shape: tuple[int, int, int]
    seed: int
    noise_scale: float
    guidance_scale: float | None
    guidance_interval: tuple[float, float]
    null_class: int | None

    @property
    def guidance(self) -> float:
        """What solver steps take: 1 without guidance, whereas a scale of 0 is the unconditional output alone."""
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    def guided(self, step: int, steps: int) -> bool:
        """Whether guidance applies at ``step``."""
        return self.guidance_scale is not None and guided(self.guidance_interval, step, steps)


class Trajectory:
    """What the ways to run a trajectory share."""

    def __init__(self, network: Network, settings: Settings):
        self.network, self.settings = network, settings

    def start(self, ids: Tensor, sigma: float) -> Tensor:
        """The initial sample."""
        s = self.settings
        return philox_normal(ids, s.shape, seed=s.seed).mul_(s.noise_scale * sigma)

    def outputs(
        self, inputs: Tensor, t: Tensor, labels: Tensor, guided: bool, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's conditional output and, where guided, its unconditional one: ``inputs`` holds both halves."""
        out = self.network.run(inputs, t, labels[: len(inputs)], step)
        return out.chunk(2) if guided else (out, None)

    def labels(self, labels: Tensor) -> Tensor:
        """The labels of both halves of a guided batch."""
        if self.settings.guidance_scale is None:
            return labels
        return torch.cat([labels, torch.full_like(labels, self.settings.null_class)])


def note_finite(finite: Tensor, cond: Tensor, uncond: Tensor | None, step: int = 0, watch: bool = False) -> None:
    """Clear the flags of images whose outputs are not finite; to ``watch`` is to raise for the first."""
    # Looked at in each step and not only in the last sample: the clamp of the clean image turns inf into 1. A sum of
    # one image is finite if its values are, in float32 and at any size that a network returns in practice.
    finite &= (cond if uncond is None else cond + uncond).flatten(1).sum(1, dtype=torch.float32).isfinite()
    if watch and not bool(finite.all()):
        raise NonFiniteError(step)


class TableTrajectory(Trajectory):
    """Steps by :func:`kr_fast.solver_step` on the rows of a table."""

    def __init__(self, network: Network, settings: Settings, table: StepTable):
        super().__init__(network, settings)
        self.table = table
        # A tensor, because diffusers' networks cut a Python float down to an integer.
        self.timesteps = torch.tensor(table.timesteps, device=network.device)

    def __call__(
        self, ids: Tensor, labels: Tensor, watch: bool = False, visit: Callable[[int, Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last sample, and by image whether all that the network returned on the way was finite.

        Args:
            visit: called with each step and the sample before it, which the step writes over.
        """
        table, s, steps = self.table, self.settings, len(self.table)
        guided = [s.guided(step, steps) for step in range(steps)]
        x, labels = self.start(ids, table.init_noise_sigma), self.labels(labels)
        buffer = (x * table.input_scales[0]).to(self.network.dtype).repeat(1 + any(guided), 1, 1, 1)
        buffer = buffer.contiguous(memory_format=torch.channels_last)
        finite = torch.ones(len(ids), dtype=torch.bool, device=x.device)
        history, numbers = History(table), self.network.prepare(table.timesteps)
        for step, (row, t) in enumerate(zip(table.rows, self.timesteps, strict=True)):
            if visit is not None:
                visit(step, x)
            inputs, number = buffer[: len(x) * (1 + guided[step])], None if numbers is None else numbers[step]
            cond, uncond = self.outputs(inputs, t, labels, guided[step], number)
            note_finite(finite, cond, uncond, step, watch)
            if cond.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                # A network that returns its input: the step reads one while it writes the other.
                cond, uncond = cond.clone(), None if uncond is None else uncond.clone()
            copies = 1 + guided[min(step + 1, steps - 1)]
            out = SolverOutput(
                sample=torch.empty_like(x) if history.reads(step, "sample") else x,
                kept=None if row.keep is None else torch.empty_like(x),
                input=None if step + 1 == steps else buffer[: len(x) * copies],
            )
            options = {"uncond_output": uncond, "guidance_scale": s.guidance, "copies": copies}
            noise = {"ids": ids, "seed": s.seed, "stream": 1 + step}
            solver_step(x, cond, row, history=history.read(step), out=out, **options, **noise)
            history.write(step, x, out.kept)
            x = out.sample
        return x, finite & x.flatten(1).sum(1).isfinite()


class OwnTrajectory(Trajectory):
    """Steps by the scheduler's own ``step()``, with the noise of the ids wherever it draws."""

    def __init__(self, network: Network, settings: Settings, runner: Runner):
        super().__init__(network, settings)
        self.runner = runner

    def __call__(self, ids: Tensor, labels: Tensor, watch: bool = False) -> tuple[Tensor, Tensor]:
        """As :class:`TableTrajectory`."""
        s, scheduler = self.settings, self.runner.fresh()
        steps = len(scheduler.timesteps)
        x, labels = self.start(ids, float(getattr(scheduler, "init_noise_sigma", 1.0))), self.labels(labels)
        finite = torch.ones(len(ids), dtype=torch.bool, device=x.device)
        for step, t in enumerate(scheduler.timesteps):
            guided = s.guided(step, steps)
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            inputs = (torch.cat([scaled, scaled]) if guided else scaled).to(self.network.dtype)
            cond, uncond = self.outputs(inputs, t.to(x.device), labels, guided)
            note_finite(finite, cond, uncond, step, watch)
            e = cond if uncond is None else uncond + s.guidance_scale * (cond - uncond)
            streams = iter(range(1 + step, 1 << 32, NEXT_DRAW))
            draw = lambda: philox_normal(ids, s.shape, seed=s.seed, stream=next(streams))  # noqa: B023, E731
            x = self.runner.step(scheduler, t, x, e.float(), draw, exact=False).prev_sample.float()
        return x, finite & x.flatten(1).sum(1).isfinite()
