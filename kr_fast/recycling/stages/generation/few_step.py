"""A generator of one to four solver steps, made from the chosen one, which takes many. Runs on rank 0.

The many-step solver leads noise ``x_0`` over ``x_1, ...`` to an image ``x_N``, in N parts of equally many steps. The
few-step network begins with the many-step one's weights and learns to go from each ``x_k`` to ``x_{k+1}`` at once: a
step of the solver is ``x_{k+1} = A_k x_k + B_k e`` for an output ``e`` of the network, so it learns

    ``e_k = (x_{k+1} - A_k x_k) / B_k``    by the mean squared error,

which for a rectified flow is the mean velocity over the part. What the many-step solver was tuned to, guidance and the
scale of the initial noise, is in the ``x_k`` and needs no second network call, and no option, any more.

Sources: Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models", 2021 (N = 1, pairs of noise and
image); Salimans and Ho, "Progressive Distillation", ICLR 2022, appendix G (the target of a step; all halvings are one
training here, as trajectories of a small network cost little); Meng et al., "On Distillation of Guided Diffusion
Models", CVPR 2023 (guidance).

No real image is seen: everything is drawn from the many-step generator, whose weights therefore bound what these leak:
of one with differential privacy it is post-processing, and spends nothing.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context, Trials
from kr_fast.recycling.drawing import Drawing
from kr_fast.recycling.search_options import trajectory_steps
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.score_error import score_error
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.sampling import (
    Sampling,
    network_calls,
    student_sampling,
    trial_key,
    tuned_sampling,
)
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.synthesis import StepTable
from kr_fast.training import AdamW
from kr_fast.training.precision import autocast

DRAWN, USED = 8, 64  # batches of trajectories that are drawn at a time, and steps that learn from them
TOLERANCE = 0.01  # of validation accuracy, by which it may be worse, besides a standard error, without a note
TIMED = 2  # micro-batches


def many_step(tuned: Sampling, few_steps: int) -> Sampling:
    """How the trajectories are drawn: as tuned, but by Euler's method (or DDIM).

    It takes as many steps as the tuned solver has network calls without guidance, rounded up to a multiple of
    ``few_steps``, so that it comes by the noise levels of the few.
    """
    calls = network_calls(dataclasses.replace(tuned, guidance_scale=1.0))
    return dataclasses.replace(tuned, num_inference_steps=trajectory_steps(calls, few_steps), solver="euler")


def run(context: Context) -> dict[str, Any]:
    """Train the few-step generator, then compare it with the many-step one: images per second, and short Students.

    With epsilon there are none, as their score on validation would be a figure of private images.
    """
    c, tuned = context.config, tuned_sampling(context)
    losses = train(
        context,
        tuned.folder(context),
        context.folder.few_step,
        tuned,
        labels=context.data.train.labels,
        seed=c.seed,
        state_path=context.folder.state / "few_step.pt",
        description="few-step generator",
    )
    sampling = student_sampling(context)
    before, after, notes = ({}, {}, []) if c.epsilon else _scores(context, tuned, sampling)
    speed = images_per_second(gkd.drawing(context, sampling, c.micro_batch))
    usual = images_per_second(gkd.drawing(context, tuned, c.micro_batch))
    return {
        "steps": c.few_steps,
        **after,
        "images_per_second": speed,
        "speedup": speed / usual,
        "many_step": {
            "num_inference_steps": tuned.num_inference_steps,
            "network_calls": network_calls(tuned),
            **before,
            "images_per_second": usual,
        },
        "notes": notes,
        "curves": {"step": [step for step, _ in losses], "loss": [value for _, value in losses]},
    }


def _scores(context: Context, tuned: Sampling, sampling: Sampling) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The score of a short Student of the many-step and of the few-step generator by name, and a note."""
    teacher_model, by = teacher.load(context), context.config.student_choose
    before = Trials(context).get(lambda: gkd.trial(context, teacher_model, tuned), **trial_key(tuned))
    after = gkd.trial(context, teacher_model, sampling)
    return {f"val_{by}": before}, {f"val_{by}": after}, note(before, after, score_error(context, before), by)


def note(before: float, after: float, error: float, by: str = "accuracy") -> list[str]:
    """What has to be said where a short Student of the few-step generator is worse on validation.

    Args:
        before, after: of the many-step and the few-step one, the accuracy or the AUC that ``by`` names.
        error: the standard error of ``before``.
    """
    if after >= before - TOLERANCE - error:
        return []
    return [
        f"a short Student of the few-step generator has a validation {by} of {after:.3f} and not {before:.3f}, which "
        "is worse by more than 0.01 and a standard error: more few_steps or few_step_training may help, and few_steps "
        "0 draws from the many-step generator"
    ]


def train(
    context: Context,
    source: Path,
    target: Path,
    tuned: Sampling,
    *,
    labels: Tensor,
    seed: int,
    state_path: Path,
    description: str | None = None,
) -> list[list[float]]:
    """Make the checkpoint ``target`` from the many-step one ``source``; returns (step, loss) now and then.

    Args:
        tuned: how the many-step one is sampled.
        labels: of the images that ``source`` was trained on.
        seed: of the trajectories' noise and of the batches.
        state_path: file from which a training that was stopped continues.
    """
    c, device = context.config, context.runtime.device
    count, batch = c.few_steps, c.generator_batch_size
    sampling, drawing_seed = many_step(tuned, count), seeds.derive(seed, "few-step trajectories")
    draw = gkd.drawing(context, sampling, DRAWN * batch, checkpoint=source, real=labels, seed=drawing_seed)
    network, scheduler, _ = generator.load(source, device)
    table = StepTable.compile(scheduler, count)
    timesteps = torch.tensor(table.timesteps, device=device)
    of_sample, of_output = (torch.tensor(values, device=device)[:, None, None, None] for values in linear(table))
    for part in network.modules():
        if isinstance(part, nn.Dropout):  # against repeating real images, of which none is here
            part.p = 0.0
    network, precision = generator.for_training(context, network), context.precision.generator
    rate = {"lr": c.generator_learning_rate, "weight_decay": 1e-4}
    own = AdamW(network.parameters(), **rate, max_grad_norm=1.0, ema_decay=c.generator_ema)
    parts, first, last = {"network": network, "optimizer": own, "ema": own.ema}, 0, c.few_step_training
    losses: list[list[float]] = []
    with files.continuing(state_path) as state:
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            first, losses = state["step"], state["losses"]
    network.train()
    window: list[Tensor] = []
    with bar(last, description, "step", first) as progress:
        for step in range(first, last):
            if step == first or step % USED == 0:
                samples, classes = trajectories(draw, step // USED, table)
            random = seeds.generator(seed, "few-step", step)
            image = torch.randint(samples.shape[1], (batch,), generator=random).to(device)
            k = torch.randint(count, (batch,), generator=random).to(device)
            x = samples[k, image]
            output = (samples[k + 1, image] - of_sample[k] * x) / of_output[k]
            generator.set_rate(own, c.generator_learning_rate * generator.rate_factor(step, last))
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(device, precision):
                out = network(x, timesteps[k], class_labels=classes[image]).sample
                loss = torch.nn.functional.mse_loss(out.float(), output)
            own.zero_grad()
            loss.backward()
            own.step()
            if own.skipped:
                got = f"{float(loss.detach())} with gradients of norm {own.grad_norm} before step {step + 1}"
                raise UserError(f"run: loss of the few-step generator must be finite, got {got}")
            window.append(loss.detach())
            progress.update()
            if (step + 1) % USED == 0 or step + 1 == last:
                losses.append([step + 1, float(torch.stack(window).mean())])
                window.clear()
                progress.set(loss=losses[-1][1])
                if step + 1 < last:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    files.save_state(state_path, {**states, "step": step + 1, "losses": losses})
    generator.save(context, network, own.ema, target, labels)
    state_path.unlink(missing_ok=True)
    return losses


def linear(table: StepTable) -> tuple[list[float], list[float]]:
    """``A`` and ``B`` of each step ``x' = A x + B e``, where nothing is clamped."""
    of_sample = [row.sample + row.x0 * row.x0_sample for row in table.rows]
    return of_sample, [row.model + row.x0 * row.x0_model for row in table.rows]


def trajectories(draw: Drawing, period: int, table: StepTable) -> tuple[Tensor, Tensor]:
    """Samples ``[N + 1, images, C, H, W]`` at the N steps of ``table`` and after them, and the labels of the images.

    The first are of standard deviation 1: the network is to be sampled without a noise scale.
    """
    sampler, ids = draw.sampler, torch.arange(period * draw.images, (period + 1) * draw.images)
    labels = draw.plan.labels(ids)
    samples = sampler.trajectories(ids, labels, every=len(sampler.table) // len(table))
    samples[0] /= sampler.noise_scale
    return samples, labels.to(samples.device)


def images_per_second(draw: Drawing) -> float:
    """Of its sampler, by itself on this process's device; the best of a few micro-batches."""
    ids = torch.arange(draw.sampler.micro_batch)
    labels, seconds = draw.plan.labels(ids), []
    for _ in range(1 + TIMED):  # the first warms up
        start = time.perf_counter()
        draw.sampler(ids, labels).cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return len(ids) / min(seconds[1:])


def drawn_images(config: RecycleConfig) -> int:
    """Trajectories that a training draws."""
    return math.ceil(config.few_step_training / USED) * DRAWN * config.generator_batch_size
