"""How synthetic images are drawn: what the choice of a checkpoint and tuning decide."""

import dataclasses
from pathlib import Path
from typing import Any

from kr_fast.recycling.context import Context
from kr_fast.recycling.search_options import WHOLE, calls_of
from kr_fast.recycling.stages.generation.generator_loss import make_scheduler
from kr_fast.synthesis.trajectory import guided


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How synthetic images are drawn, and how long a Student learns from each set.

    ``images``, ``passes``: of a period; 0 for as many as the configuration has. ``few_step``: from the generator of few
    steps that was made from the checkpoint. ``ema_length``: of the weights' average in the checkpoint; 0 for that of
    ``generator_ema``.
    """

    checkpoint: int
    num_inference_steps: int
    guidance_scale: float
    noise_scale: float
    confidence: float
    guidance_interval: tuple[float, float] = WHOLE
    solver: str = "euler"
    images: int = 0
    passes: int = 0
    few_step: bool = False
    ema_length: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # a list where read from JSON

    def values(self) -> dict[str, Any]:
        """The fields as plain values, equal to themselves once written as JSON and read."""
        return {**dataclasses.asdict(self), "guidance_interval": list(self.guidance_interval)}

    def folder(self, context: Context) -> Path:
        """Of the run's network."""
        return context.folder.few_step if self.few_step else context.folder.generator(self.checkpoint, self.ema_length)

    def scheduler(self, objective: str) -> Any:
        """diffusers' scheduler of the solver for a generator of this training objective."""
        return make_scheduler(objective, self.solver)


def default_sampling(context: Context, step: int, ema_length: float = 0.0) -> Sampling:
    """The configured sampling, from checkpoint ``step`` with an average of the weights of this length."""
    c = context.config
    usual = (c.num_inference_steps, c.guidance_scale, c.noise_scale, c.confidence)
    return Sampling(step, *usual, c.guidance_interval, c.solver, ema_length=ema_length)


def tuned_sampling(context: Context) -> Sampling:
    """As it was chosen for the run."""
    return Sampling(**context.result("tuning")["sampling"])


def few_step_sampling(tuned: Sampling, steps: int) -> Sampling:
    """Of the few-step generator made from one sampled by ``tuned``, whose guidance and noise scale it has learnt."""
    options = {"images": tuned.images, "passes": tuned.passes, "few_step": True, "ema_length": tuned.ema_length}
    return Sampling(tuned.checkpoint, steps, 1.0, 1.0, tuned.confidence, **options)


def student_sampling(context: Context) -> Sampling:
    """How the Student's images are drawn: as tuned, or by the few-step generator where there is one."""
    tuned, steps = tuned_sampling(context), context.config.few_steps
    return few_step_sampling(tuned, steps) if steps else tuned


def trial_key(sampling: Sampling, length: int = 1, repeat: int = 0) -> dict[str, Any]:
    """What the result of a short Student is kept by."""
    further = {"length": length, "repeat": repeat}
    return {**sampling.values(), **{name: value for name, value in further.items() if value != int(name == "length")}}


def network_calls(sampling: Sampling) -> int:
    """Evaluations of the generator for an image: a guided solver step takes two, one of Heun's method too."""
    calls = calls_of(sampling.solver, sampling.num_inference_steps)
    interval = sampling.guidance_interval
    return calls + sum(sampling.guidance_scale != 1 and guided(interval, call, calls) for call in range(calls))


def guides(sampling: Sampling) -> bool:
    """Whether guidance, if there is any, applies to a step."""
    unguided = calls_of(sampling.solver, sampling.num_inference_steps)
    return sampling.guidance_scale == 1 or network_calls(sampling) > unguided
