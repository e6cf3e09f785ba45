"""StepTable: the trajectory of each scheduler, by its own code and by the table, for a non-linear network."""

import copy
import itertools
import math
import sys

import diffusers
import pytest
import torch

from kr_fast.backends import reference
from kr_fast.ops.solver_step import solver_step
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import StepTable

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOAT64, FLOAT32 = 1e-12, 5e-6  # by the precision in which the scheduler's own step computes
IDS = torch.tensor([3, 0, 2**35 + 1, 8])


def cases():
    for prediction, clip, eta in itertools.product(PREDICTIONS, (False, True), (0.0, 0.7, 1.0)):
        options = {"prediction_type": prediction, "clip_sample": clip}
        yield pytest.param("DDIMScheduler", options, eta, FLOAT64, id=f"DDIM-{prediction}-clip={clip}-eta={eta}")
    for prediction, clip, kind in itertools.product(PREDICTIONS, (False, True), ("fixed_small", "fixed_large")):
        options = {"prediction_type": prediction, "clip_sample": clip, "variance_type": kind}
        yield pytest.param("DDPMScheduler", options, 0.0, FLOAT64, id=f"DDPM-{prediction}-clip={clip}-{kind}")
    for prediction in PREDICTIONS:
        yield pytest.param(
            "EulerDiscreteScheduler", {"prediction_type": prediction}, 0.0, FLOAT32, id=f"Euler-{prediction}"
        )
    more = [
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                           "prediction_type": "v_prediction"}, FLOAT64),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample_range": 2.0}, FLOAT64),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, FLOAT64),
        ("FlowMatchEulerDiscreteScheduler", {}, FLOAT32),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, FLOAT32),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, FLOAT32),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, FLOAT32),
        ("EulerAncestralDiscreteScheduler", {}, FLOAT32),
        ("EDMEulerScheduler", {}, FLOAT32),
        ("LCMScheduler", {}, FLOAT64),
    ]  # fmt: skip
    for k, (name, options, tolerance) in enumerate(more):
        yield pytest.param(name, options, 0.0, tolerance, id=f"{name}-{k}")


def start(scheduler, steps):
    """What diffusers' own pipelines do: flow matching gets evenly spaced sigmas, not the default grid."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def network(x):
    return torch.sin(3 * x) + 0.4 * x.roll(1, -1) + 0.1


def noise_of(step, shape):
    return reference.philox_normal(IDS, math.prod(shape), seed=5, stream=1 + step).view(len(IDS), *shape)


@pytest.mark.parametrize(("name", "options", "eta", "tolerance"), list(cases()))
@pytest.mark.parametrize("steps", [1, 7])
def test_trajectory_is_the_schedulers_own(monkeypatch, name, options, eta, tolerance, steps):
    scheduler = getattr(diffusers, name)(**options)
    before = copy.deepcopy(scheduler.config)
    table = StepTable.compile(scheduler, steps, eta=eta)
    assert scheduler.config == before
    assert len(table) == len(table.timesteps) == len(table.input_scales) == len(table.rows)

    start(scheduler, steps)
    assert [float(t) for t in scheduler.timesteps] == [float(t) for t in table.timesteps]
    assert table.init_noise_sigma == float(getattr(scheduler, "init_noise_sigma", 1.0))
    shape = (2, 3, 3)
    first = noise_of(-1, shape) * table.init_noise_sigma
    module, theirs, ours, scale = sys.modules[type(scheduler).__module__], first, first, table.input_scales[0]
    extra = {"eta": eta} if eta else {}
    drawn = []
    for step, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(
            module,
            "randn_tensor",
            lambda *_, step=step, **__: drawn.append(step) or noise_of(step, shape),
            raising=False,
        )
        inputs = scheduler.scale_model_input(theirs, t) if hasattr(scheduler, "scale_model_input") else theirs
        theirs = scheduler.step(network(inputs.double()), t, theirs, **extra).prev_sample.double()
        ours = solver_step(ours, network(ours * scale), table.rows[step], ids=IDS, seed=5, stream=1 + step)
        scale = table.rows[step].next_input
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1), f"step {step}"
    noisy = {step for step, row in enumerate(table.rows) if row.noise != 0}
    assert noisy <= set(drawn)
    if eta and steps > 1:
        assert noisy  # eta that changed nothing would pass the comparison


def test_clipping_was_at_work():
    """The cases above clip; the table of an unclipped scheduler must then differ."""
    free, clipped = (StepTable.compile(diffusers.DDIMScheduler(clip_sample=c), 5) for c in (False, True))
    assert all(row.x0 == 0 for row in free.rows)
    assert all(row.x0 != 0 and row.clip == 1.0 for row in clipped.rows)


def test_rows_of_ddim_are_its_equation():
    """Song, Meng and Ermon, "Denoising Diffusion Implicit Models", 2021, eq. 12 with sigma = 0."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    table = StepTable.compile(scheduler, 10)
    assert table.timesteps == tuple(range(900, -1, -100))
    assert all(isinstance(t, int) for t in table.timesteps)
    for row, t in zip(table.rows, table.timesteps, strict=True):
        a = float(scheduler.alphas_cumprod[t])
        before = float(scheduler.alphas_cumprod[t - 100]) if t >= 100 else 1.0
        assert math.isclose(row.sample, math.sqrt(before / a), rel_tol=1e-6)
        want = math.sqrt(1 - before) - math.sqrt(before * (1 - a) / a)
        assert math.isclose(row.model, want, rel_tol=1e-5, abs_tol=1e-7)
        assert row.noise == 0


def test_flow_matching_keeps_its_fractional_timesteps():
    table = StepTable.compile(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 7)
    assert any(t != int(t) for t in table.timesteps)
    assert sum(row.model for row in table.rows) == pytest.approx(-1, abs=1e-6)  # from sigma 1 to sigma 0


@pytest.mark.parametrize(
    ("scheduler", "steps", "eta", "text"),
    [
        (diffusers.DPMSolverMultistepScheduler(), 8, 0.0, "be a memoryless linear solver.*got DPMSolverMultistep"),
        (diffusers.UniPCMultistepScheduler(), 8, 0.0, "scheduler must .*UniPC"),
        (diffusers.PNDMScheduler(), 8, 0.0, "be a memoryless linear solver.*PNDM"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), 8, 0.0, "be a memoryless linear solver.*FlowMatchHeun"),
        (diffusers.HeunDiscreteScheduler(), 8, 0.0, "be a memoryless linear solver.*Heun"),
        (diffusers.LMSDiscreteScheduler(), 8, 0.0, "be a memoryless linear solver.*LMS"),
        (diffusers.DDIMScheduler(thresholding=True), 8, 0.0, "not use dynamic thresholding, got DDIMScheduler"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), 8, 0.0, "scheduler must .*DDPMScheduler"),
        (diffusers.RePaintScheduler(), 8, 0.0, r"step from \(model_output, timestep, sample\).*RePaint"),
        (
            diffusers.DDIMScheduler(num_train_timesteps=5),
            8,
            0.0,
            "scheduler must .*`num_inference_steps`: 8 cannot be larger",
        ),
        (diffusers.DDIMScheduler(), 0, 0.0, r"num_inference_steps must be in \[1, 10000\], got 0"),
        (diffusers.DDIMScheduler(), 8, 1.5, r"eta must be in \[0, 1\].*got 1.5"),
        (diffusers.DDPMScheduler(), 8, 0.5, r"eta must be in \[0, 1\], and 0 for a scheduler that does not take it"),
        (object(), 8, 0.0, r"scheduler must .*object"),
    ],
)
def test_what_cannot_be_compiled_is_refused(scheduler, steps, eta, text):
    with pytest.raises(UserError, match="StepTable: .*" + text):
        StepTable.compile(scheduler, steps, eta=eta)


def test_diffusers_is_left_as_it_was():
    from diffusers.schedulers import scheduling_ddim, scheduling_flow_match_euler_discrete

    drawn, had = scheduling_ddim.randn_tensor, hasattr(scheduling_flow_match_euler_discrete, "randn_tensor")
    StepTable.compile(diffusers.DDIMScheduler(), 3, eta=1.0)
    StepTable.compile(diffusers.FlowMatchEulerDiscreteScheduler(), 3)
    assert scheduling_ddim.randn_tensor is drawn
    assert hasattr(scheduling_flow_match_euler_discrete, "randn_tensor") == had
