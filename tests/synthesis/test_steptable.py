"""StepTable: the trajectory of each scheduler, by its own code and by the table, for a non-linear network."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from kr_fast.ops.sampling import reference
from kr_fast.ops.sampling.solver_step import solver_step
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import StepTable
from kr_fast.synthesis.steptable import History

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# By the precision in which the scheduler's own step computes; float32 casts of a sigma of 150 come back as 1e-5.
FLOAT64, FLOAT32 = 1e-11, 5e-5
IDS = torch.tensor([3, 0, 2**35 + 1, 8])
CLIPS = {"clip_sample": True}
DYNAMIC = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
# scheduler, options, whether it knows v- and sample-prediction, precision. One line a solver or a branch of its code.
SOLVERS = [
    ("DDIM", {}, True, FLOAT64),
    ("DDIM", CLIPS, True, FLOAT64),
    ("DDIM", {"clip_sample": False, **DYNAMIC}, True, FLOAT64),
    ("DDIM", {**ZERO_SNR, "prediction_type": "v_prediction"}, False, FLOAT64),
    ("DDIM", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample_range": 2.0}, False, FLOAT64),
    ("DDIM", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, False, FLOAT64),
    ("DDIMParallel", {}, True, FLOAT64),
    ("DDIMInverse", {}, True, FLOAT64),
    ("DDPM", {"clip_sample": False}, True, FLOAT64),
    ("DDPM", CLIPS, True, FLOAT64),
    ("DDPM", {"variance_type": "fixed_large"}, True, FLOAT64),
    ("DDPM", {"clip_sample": False, **DYNAMIC}, True, FLOAT64),
    ("DPMSolverMultistep", {}, True, FLOAT32),
    ("DPMSolverMultistep", {"solver_order": 3}, True, FLOAT32),
    ("DPMSolverMultistep", {"solver_type": "heun"}, True, FLOAT32),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", **SIGMA_MIN}, True, FLOAT32),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, True, FLOAT32),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}, True, FLOAT32),
    ("DPMSolverMultistep", DYNAMIC, True, FLOAT32),
    ("DPMSolverMultistepInverse", {}, True, FLOAT32),
    ("DPMSolverSinglestep", {}, True, FLOAT64),
    ("DPMSolverSinglestep", {"solver_order": 3}, True, FLOAT64),
    ("UniPCMultistep", {}, True, FLOAT64),
    ("UniPCMultistep", {"solver_order": 3}, True, FLOAT64),
    ("UniPCMultistep", {"solver_type": "bh1", **SIGMA_MIN}, True, FLOAT64),
    ("UniPCMultistep", {"predict_x0": False, **SIGMA_MIN}, True, FLOAT64),
    ("UniPCMultistep", DYNAMIC, True, FLOAT64),
    ("DEISMultistep", {}, True, FLOAT64),
    ("DEISMultistep", {"solver_order": 3}, True, FLOAT64),
    ("PNDM", {"skip_prk_steps": True}, False, FLOAT64),
    ("PNDM", {}, False, FLOAT64),
    ("IPNDM", {}, False, FLOAT64),
    ("EulerDiscrete", {}, True, FLOAT32),
    ("EulerDiscrete", {"use_karras_sigmas": True}, True, FLOAT32),
    ("EulerAncestralDiscrete", {}, True, FLOAT32),
    ("HeunDiscrete", {}, True, FLOAT64),
    ("HeunDiscrete", CLIPS, True, FLOAT64),
    ("KDPM2Discrete", {}, True, FLOAT64),
    ("KDPM2AncestralDiscrete", {}, True, FLOAT64),
    ("LMSDiscrete", {}, True, FLOAT64),
    ("FlowMatchEulerDiscrete", {}, False, FLOAT32),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, False, FLOAT32),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, False, FLOAT32),
    ("FlowMatchHeunDiscrete", {}, False, FLOAT32),
    ("LCM", {}, True, FLOAT64),
    ("TCD", {}, True, FLOAT64),
    ("EDMEuler", {}, False, FLOAT32),
    ("EDMDPMSolverMultistep", {}, False, FLOAT32),
    ("CMStochasticIterative", {}, False, FLOAT64),
    ("SASolver", {}, True, FLOAT64),
    ("SASolver", {"predictor_order": 3, "corrector_order": 3}, True, FLOAT64),
]
# What diffusers 0.42 does not do itself: these raise or return NaN in their own code.
NOT_THEIRS = {(name, "sample") for name in ("DDIMInverse", "EulerAncestralDiscrete", "KDPM2Discrete")}
NOT_THEIRS |= {("KDPM2AncestralDiscrete", "sample")}
FEWEST = {"PNDM": 4}  # steps of a Runge-Kutta start


def cases():
    for name, options, predicts, tolerance in SOLVERS:
        for prediction in PREDICTIONS if predicts else (None,):
            if (name, prediction) not in NOT_THEIRS:
                given = {**options, **({"prediction_type": prediction} if prediction else {})}
                label = "-".join([name, *(f"{k}={v}" for k, v in given.items())])
                for steps in (FEWEST.get(name, 1), 7):
                    yield pytest.param(f"{name}Scheduler", given, None, steps, tolerance, id=f"{label}-{steps}")
    for prediction, clip, eta in itertools.product(PREDICTIONS, (False, True), (0.7, 1.0)):
        options = {"prediction_type": prediction, "clip_sample": clip}
        yield pytest.param("DDIMScheduler", options, eta, 7, FLOAT64, id=f"DDIM-{prediction}-clip={clip}-eta={eta}")
    yield pytest.param("TCDScheduler", {}, 0.8, 7, FLOAT64, id="TCD-eta=0.8")


def start(scheduler, steps):
    """What diffusers' own pipelines do: flow matching gets evenly spaced sigmas, not the default grid."""
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def network(x):
    return torch.sin(3 * x) + 0.4 * x.roll(1, -1) + 0.1


def noise_of(step, shape):
    return reference.philox_normal(IDS, math.prod(shape), seed=5, stream=1 + step).view(len(IDS), *shape)


def own_trajectory(monkeypatch, scheduler, steps, eta, shape):
    """The samples that the scheduler's own step() makes, with our noise, and the steps at which it drew."""
    start(scheduler, steps)
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x, result, drawn = noise_of(-1, shape) * sigma, [], []
    extra = {"eta": eta} if eta is not None else {}
    draw = torch.randn
    for step, t in enumerate(scheduler.timesteps):
        noise = noise_of(step, shape)

        def randn(*size, step=step, noise=noise, **options):
            if tuple(size[0] if len(size) == 1 else size) != noise.shape:
                return draw(*size, **options)
            drawn.append(step)
            return noise.to(options.get("dtype") or torch.float32)

        monkeypatch.setattr(torch, "randn", randn)
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(inputs.double()), t, x, **extra).prev_sample.double()
        result.append(x)
    monkeypatch.setattr(torch, "randn", draw)
    return result, drawn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' use of numpy
@pytest.mark.parametrize(("name", "options", "eta", "steps", "tolerance"), list(cases()))
def test_trajectory_is_the_schedulers_own(monkeypatch, name, options, eta, steps, tolerance):
    scheduler = getattr(diffusers, name)(**options)
    before = copy.deepcopy(scheduler.config)
    table = StepTable.compile(scheduler, steps, eta=eta)
    assert scheduler.config == before
    assert len(table) == len(table.timesteps) == len(table.input_scales) == len(table.rows) == len(table.sources)
    assert table.replay_error < 1e-11

    shape = (2, 3, 3)
    theirs, drawn = own_trajectory(monkeypatch, scheduler, steps, eta, shape)
    assert [float(t) for t in scheduler.timesteps] == [float(t) for t in table.timesteps]
    assert table.init_noise_sigma == float(getattr(scheduler, "init_noise_sigma", 1.0))
    x, scale, history = noise_of(-1, shape) * table.init_noise_sigma, table.input_scales[0], History(table)
    for step, row in enumerate(table.rows):
        emit = ("sample", "kept") if row.keep else ("sample",)
        out = solver_step(
            x, network(x * scale), row, history=history.read(step), ids=IDS, seed=5, stream=1 + step, emit=emit
        )
        after, kept = (out.sample, out.kept) if row.keep else (out, None)
        history.write(step, x, kept)
        x, scale = after, row.next_input
        assert (x - theirs[step]).abs().max() <= tolerance * theirs[step].abs().max().clamp_min(1), f"step {step}"
    assert not history.held
    noisy = {step for step, row in enumerate(table.rows) if row.noise != 0}
    assert noisy <= set(drawn)
    if eta:
        assert noisy  # eta that changed nothing would pass the comparison


def terms(table):
    """Tensors read by the widest step, of (sample, output, clean image, noise) and history."""
    return max(sum(c != 0 for c in (*row[3:5], row.x0, row.noise)) + len(row.history) for row in table.rows)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("DDIM", {"clip_sample": False}, 2),
        ("EulerDiscrete", {}, 2),
        ("DDPM", {"clip_sample": False}, 3),
        ("DPMSolverMultistep", {}, 3),
        ("HeunDiscrete", {}, 3),
        ("DPMSolverMultistep", {"solver_order": 3}, 4),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 4),
        ("UniPCMultistep", {}, 4),
        ("DEISMultistep", {"solver_order": 3}, 4),
        ("UniPCMultistep", {"solver_order": 3}, 5),
        ("PNDM", {"skip_prk_steps": True}, 5),
        ("LMSDiscrete", {}, 5),
        ("IPNDM", {}, 5),
    ],
)
def test_no_step_reads_more_than_it_must(name, options, most):
    """Each term is a pass over memory; the counts are those of the solvers' equations."""
    assert terms(StepTable.compile(getattr(diffusers, name + "Scheduler")(**options), 12)) == most


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
        (
            diffusers.UniPCMultistepScheduler(solver_type="bh1"),
            8,
            0.0,
            "be a linear solver, .*non-finite values at step 7",
        ),
        (diffusers.DDIMScheduler(**ZERO_SNR), 8, 0.0, "be a linear solver, .*non-finite values at step 0"),
        (diffusers.ScoreSdeVeScheduler(), 8, 0.0, "have set_timesteps and step, got ScoreSdeVeScheduler"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), 8, 0.0, "scheduler must .*DDPMScheduler"),
        (
            diffusers.RePaintScheduler(),
            8,
            0.0,
            r"must run 8 steps, got RePaintScheduler, whose own code fails \(TypeError",
        ),
        (
            diffusers.DDIMScheduler(num_train_timesteps=5),
            8,
            0.0,
            "scheduler must .*`num_inference_steps`: 8 cannot be larger",
        ),
        (
            diffusers.DDIMScheduler(),
            0,
            0.0,
            "num_inference_steps must be an integer, at least 1 and at most 10000, got 0",
        ),
        (diffusers.DDIMScheduler(), 8, 1.5, r"eta must be in \[0, 1\].*got 1.5"),
        (
            diffusers.DDPMScheduler(),
            8,
            0.5,
            r"eta must be in \[0, 1\], and 0 or None for a scheduler that does not take it",
        ),
        (object(), 8, 0.0, r"scheduler must .*object"),
    ],
)
def test_what_cannot_be_compiled_is_refused(scheduler, steps, eta, text):
    with pytest.raises(UserError, match="StepTable: .*" + text):
        StepTable.compile(scheduler, steps, eta=eta)


def test_digest_is_of_what_kernels_read():
    """The last bits of LAPACK's float64 differ between kinds of CPU; a change that float32 shows is another table."""
    table = StepTable.compile(diffusers.UniPCMultistepScheduler(), 5)

    def scaled(factor):
        rows = [
            row._replace(sample=row.sample * factor, history=tuple(h * factor for h in row.history))
            for row in table.rows
        ]
        return dataclasses.replace(table, rows=tuple(rows)).digest()

    assert scaled(1 + 1e-14) == table.digest()
    assert scaled(1 + 1e-6) != table.digest()
    clipped = table.rows[0]._replace(quantile=0.5)
    assert dataclasses.replace(table, rows=(clipped, *table.rows[1:])).digest() != table.digest()


def test_diffusers_is_left_as_it_was():
    from diffusers.schedulers import scheduling_ddim, scheduling_flow_match_euler_discrete

    drawn, had = scheduling_ddim.randn_tensor, hasattr(scheduling_flow_match_euler_discrete, "randn_tensor")
    StepTable.compile(diffusers.DDIMScheduler(), 3, eta=1.0)
    StepTable.compile(diffusers.FlowMatchEulerDiscreteScheduler(), 3)
    assert scheduling_ddim.randn_tensor is drawn
    assert hasattr(scheduling_flow_match_euler_discrete, "randn_tensor") == had
