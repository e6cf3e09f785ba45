"""Networks and samplers small enough to run in every test."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kr_fast.synthesis import Sampler

diffusers = pytest.importorskip("diffusers")

CLASSES = 3  # and the null class
# A mild noise schedule: the network is not trained, and 1 / sqrt(alpha) of the usual one turns its output into black
# and white.
MILD = {"beta_start": 1e-4, "beta_end": 2e-3}
SOLVERS = {
    "DDIM": diffusers.DDIMScheduler(**MILD, clip_sample=True),
    "DDPM": diffusers.DDPMScheduler(**MILD),
    "DDIM thresholding": diffusers.DDIMScheduler(**MILD, clip_sample=False, thresholding=True, sample_max_value=1.5),
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(**MILD),
    "DPM++ 3M": diffusers.DPMSolverMultistepScheduler(**MILD, solver_order=3),
    "SDE-DPM++": diffusers.DPMSolverMultistepScheduler(**MILD, algorithm_type="sde-dpmsolver++"),
    "DPM++ singlestep": diffusers.DPMSolverSinglestepScheduler(**MILD),
    "UniPC": diffusers.UniPCMultistepScheduler(**MILD),
    "DEIS": diffusers.DEISMultistepScheduler(**MILD),
    "PNDM": diffusers.PNDMScheduler(**MILD, skip_prk_steps=True),
    "iPNDM": diffusers.IPNDMScheduler(),
    "Euler": diffusers.EulerDiscreteScheduler(**MILD),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**MILD),
    "Heun": diffusers.HeunDiscreteScheduler(**MILD),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(**MILD),
    "LMS": diffusers.LMSDiscreteScheduler(**MILD),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow Heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "LCM": diffusers.LCMScheduler(**MILD),
    "TCD": diffusers.TCDScheduler(**MILD),
    "SA-Solver": diffusers.SASolverScheduler(**MILD),
}


def make_unet(channels=3, embeddings=CLASSES + 1, size=8, seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        num_class_embeds=embeddings,
        add_attention=False,
    ).eval()


def make_sampler(unet, scheduler=None, steps=3, **options):
    options = {"seed": 7, "micro_batch": 8, **options}
    embeddings = getattr(getattr(unet, "config", None), "num_class_embeds", None)
    if options.get("guidance_scale") not in (None, 1) and embeddings:
        options.setdefault("num_classes", embeddings - 1)
    return Sampler(unet, scheduler or diffusers.DDIMScheduler(clip_sample=False), steps, **options)


def start(scheduler, steps):
    """What diffusers' own pipelines do: flow matching gets evenly spaced sigmas, not the default grid."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)


class Ops(TorchDispatchMode):
    """Names of the ops of torch that run in its block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))
