"""The generator's loss.

``flow``: ``x_s = (1 - s) x + s n``, the network learns ``n - x`` (Liu et al., "Flow Straight and Fast", ICLR 2023);
``epsilon`` and ``v_prediction``: DDPM on a cosine schedule (Ho et al., 2020; Salimans and Ho, 2022).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kr_fast.data import to_float
from kr_fast.models import padded_size
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages.generation.augmentation import augmented, batch_index
from kr_fast.runtime import seeds
from kr_fast.runtime.storage.image_rows import Images


def make_scheduler(objective: str, solver: str = "euler") -> Any:
    """The scheduler that samples a generator of a training objective.

    ``euler``: Euler's method, which is DDIM for ``epsilon`` and ``v_prediction``; ``heun``: Heun's, for ``flow``;
    ``dpm++``: DPM-Solver++ of second order, multistep (Lu et al., 2022).
    """
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
    )

    if objective == "flow":
        if solver == "dpm++":
            options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
            return DPMSolverMultistepScheduler(**options)
        return FlowMatchHeunDiscreteScheduler() if solver == "heun" else FlowMatchEulerDiscreteScheduler()
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": objective, "timestep_spacing": "trailing"}
    if solver == "dpm++":
        # In pure noise alpha is 5e-5, so an image by its predicted noise holds the error of that 20,000 times: it is
        # clipped to [-1, 1], as DDIM's (thresholding with sample_max_value at its default, 1).
        return DPMSolverMultistepScheduler(**options, thresholding=objective == "epsilon")
    return DDIMScheduler(**options, clip_sample=True)


def padded(images: Tensor, levels: int, mirrored: Tensor | None = None) -> Tensor:
    """uint8 images in [-1, 1], padded by reflection at the bottom and right to what a UNet of ``levels`` can halve.

    ``mirrored``: bool ``[N]``, which of them are mirrored before: the sampler cuts the bottom and right off again.
    """
    images = to_float(images)
    if mirrored is not None:
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    bottom, right = padded_size(height, levels) - height, padded_size(width, levels) - width
    return torch.nn.functional.pad(images, (0, right, 0, bottom), mode="reflect") if bottom or right else images


def batch_loss(
    context: Context, network: Any, images: Images, labels: Tensor, step: int, seed: int, share: Tensor
) -> Tensor:
    """The loss of this rank's share of a batch, a function of (seed, step) on any number of ranks but for dropout.

    ``images``: uint8 ``[N, H, W, C]``; the batch alone becomes floats.
    """
    c = context.config
    generator = seeds.generator(seed, "generator", step)
    count = c.generator_batch_size
    index = batch_index(c, labels, count, generator)
    level = torch.rand(count, generator=generator)
    dropped = torch.rand(count, generator=generator) < c.label_dropout
    mirrored = torch.rand(count, generator=generator) < 0.5
    index, level, dropped, mirrored = (v[share].to(images.device) for v in (index, level, dropped, mirrored))
    x = padded(images[index], len(c.generator_widths), mirrored if c.generator_flip else None)
    y = labels[index].masked_fill(dropped, context.data.num_classes)
    x = augmented(network, c, x, share, generator)
    ids = (step * count + share).to(images.device)
    noise = philox_normal(ids, x.shape[1:], seed=seeds.derive(seed, "generator noise"))
    noisy, time, target = noised(c, x, noise, level)
    with dropout_of(c, images.device, seed, step, int(share[0])):
        prediction = network(noisy, time, class_labels=y).sample.float()
    return torch.nn.functional.mse_loss(prediction, target)


def noised(config: RecycleConfig, x: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(``x`` with noise at ``level``, uniform in [0, 1); the time that the network is told; what it learns)."""
    if config.generator_objective == "flow":
        sigma = level[:, None, None, None]
        noisy, time, target = (1 - sigma) * x + sigma * noise, level * 1000, noise - x
    else:
        time = (level * 1000).long()
        alpha = _alphas(x.device)[time][:, None, None, None]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        target = noise if config.generator_objective == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x
    return noisy.contiguous(memory_format=torch.channels_last), time, target


@contextlib.contextmanager
def dropout_of(config: RecycleConfig, device: torch.device, seed: int, step: int, rank: int) -> Iterator[None]:
    """Dropout within is a function of (seed, step, rank): torch's generators are set, and put back."""
    if not config.generator_dropout:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "dropout", step, rank))
        yield


def _alphas(device: torch.device) -> Tensor:
    return make_scheduler("epsilon").alphas_cumprod.to(device)
