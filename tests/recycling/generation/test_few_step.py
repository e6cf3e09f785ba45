"""The few-step generator: its target, what it learns, going on after a stop, and where its images are drawn from."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from toy_runs import context_of, metrics, new_context

from kr_fast.cli import main
from kr_fast.models import unet
from kr_fast.ops.sampling.pack_uint8 import pack_uint8
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.recycling import trained_generator
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.preflight import memory_and_disk, networks, time_estimate
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import few_step, generator
from kr_fast.recycling.stages.generation.generator_loss import make_scheduler
from kr_fast.recycling.stages.generation.sampling import Sampling, student_sampling
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis import StepTable
from kr_fast.training import EMA

NEEDS = (memory_and_disk.disk_needs, memory_and_disk.memory_needs)
SAMPLING = Sampling(1, 5, 2.0, 1.2, 0.0)  # five steps: rounded up to a multiple of the few


@pytest.mark.parametrize("objective", ["flow", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_step_with_the_target_lands_on_the_next_sample(objective, steps):
    """By the scheduler's own step in float64, on samples within the clamp of DDIM; many-step times include the few."""
    draw = torch.Generator().manual_seed(0)
    table, scheduler = StepTable.compile(make_scheduler(objective), steps), make_scheduler(objective)
    many = StepTable.compile(make_scheduler(objective), 3 * steps)
    assert table.timesteps == many.timesteps[::3]
    if objective == "flow":
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    for k, (of_sample, of_output) in enumerate(zip(*few_step.linear(table), strict=True)):
        x, following = (0.3 * torch.randn(2, 1, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
        if k + 1 < steps:  # noise of the next level, so that no clean image is beyond the clamp
            following = 0.1 * following + 0.5 * x
        output = (following - of_sample * x) / of_output
        actual = scheduler.step(output, scheduler.timesteps[k], x).prev_sample
        torch.testing.assert_close(actual, following, rtol=1e-5, atol=1e-5)


@pytest.fixture
def many_step(tmp_path, monkeypatch):
    """(context, checkpoint of a network whose answers depend on noise, time and class, labels).

    Each set of trajectories is for 32 steps here, so that 48 steps need a second one.
    """
    monkeypatch.setattr(few_step, "USED", 32)
    options = {"few_steps": 2, "few_step_training": 48, "generator_learning_rate": 5e-3, "generator_ema": 0.9}
    context = new_context(tmp_path, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = unet(8, 8, 1, 2, widths=(8, 8), layers=1)
    with torch.no_grad():
        network.conv_out.weight *= 4  # far from a constant velocity, which one step would follow
    labels, path = context.data.train.labels, context.folder.generator(1)
    generator.save(context, network, EMA(list(network.parameters()), 0.9), path, labels)
    return context, path, labels


def images(context, sampling, checkpoint):
    draw = gkd.drawing(context, sampling, 64, checkpoint=checkpoint)
    ids = torch.arange(1000, 1064)
    return draw.sampler(ids, draw.plan.labels(ids)).double()


def test_it_draws_what_the_many_step_generator_draws(many_step, tmp_path):
    """Without guidance and noise scale, and nearer than the many-step network in as few steps."""
    context, source, labels = many_step
    target, state_path = tmp_path / "few", tmp_path / "state.pt"
    losses = few_step.train(context, source, target, SAMPLING, labels=labels, seed=0, state_path=state_path)
    assert [step for step, _ in losses] == [32, 48]
    assert losses[1][1] < losses[0][1]
    few = dataclasses.replace(SAMPLING, num_inference_steps=2, guidance_scale=1.0, noise_scale=1.0)
    expected = images(context, few_step.many_step(SAMPLING, 2), source)
    assert few_step.many_step(SAMPLING, 2).num_inference_steps == 6
    learnt, before = (images(context, few, path) for path in (target, source))
    assert (learnt - expected).square().mean() < 0.7 * (before - expected).square().mean()
    assert files.read_json(target / "objective.json") == files.read_json(source / "objective.json")


def test_trajectories_begin_with_the_noise_of_the_sampler_and_end_with_its_images(many_step):
    context, source, labels = many_step
    draw = gkd.drawing(context, few_step.many_step(SAMPLING, 2), 40, checkpoint=source, real=labels, seed=1)
    samples, classes = few_step.trajectories(draw, 2, StepTable.compile(make_scheduler("flow"), 2))
    ids = torch.arange(80, 120)
    assert torch.equal(classes, draw.plan.labels(ids))
    torch.testing.assert_close(samples[0], philox_normal(ids, (1, 8, 8), seed=draw.sampler.seed))
    assert torch.equal(pack_uint8(samples[-1]), draw.sampler(ids, classes))
    assert len(samples) == 3


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(many_step, tmp_path, monkeypatch):
    context, source, labels = many_step
    options = {"labels": labels, "seed": 3}
    few_step.train(context, source, tmp_path / "whole", SAMPLING, **options, state_path=tmp_path / "whole.pt")
    draw = few_step.trajectories

    def first_only(drawing, period, table):
        if period:
            raise KeyboardInterrupt
        return draw(drawing, period, table)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(few_step, "trajectories", first_only)
        few_step.train(context, source, tmp_path / "stopped", SAMPLING, **options, state_path=tmp_path / "state.pt")
    assert not (tmp_path / "stopped").exists()
    assert files.load_state(tmp_path / "state.pt")["step"] == few_step.USED
    few_step.train(context, source, tmp_path / "stopped", SAMPLING, **options, state_path=tmp_path / "state.pt")
    whole, stopped = (tmp_path / name / "unet" / generator.WEIGHTS for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    assert not (tmp_path / "state.pt").exists()


def test_worse_by_more_than_the_tolerance_is_said():
    """With a standard error of 0.0105 the limit is 0.9595."""
    assert few_step.note(0.98, 0.960, 0.0105) == []
    (words,) = few_step.note(0.98, 0.958, 0.0105)
    assert "validation accuracy of 0.958 and not 0.980" in words


@pytest.mark.pipeline
def test_students_and_synthesize_draw_from_it(audited, tmp_path, monkeypatch, capsys):
    """The released images are the few-step network's own, in two calls each; other samplings are refused."""
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    out, run = audited[0], context_of(audited[0])
    sampling = student_sampling(run)
    assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.noise_scale) == (2, 1.0, 1.0)
    drawing = gkd.drawing(run, sampling, run.config.images)
    _, _, last = drawing(run.config.periods - 1)
    assert torch.equal(last, torch.from_numpy(np.load(run.folder.images)))
    for index in range(4):  # each shadow pipeline has one of its own
        few, many = (run.folder.shadow_students / f"{name}-{index:03d}" for name in ("few-step", "generator"))
        assert files.read_json(few / "objective.json") == files.read_json(many / "objective.json")
        assert files.load_tensors(few / "unet" / generator.WEIGHTS).keys()
    figures = metrics(out)["few_step"]
    assert figures["speedup"] == figures["images_per_second"] / figures["many_step"]["images_per_second"]
    assert "The few-step generator" in (out / "release" / "report.md").read_text()

    made = trained_generator.open_generator(out, torch.device("cpu"))
    assert made.few_step
    many = trained_generator.open_generator(out, torch.device("cpu"), made.step)
    assert many.sampling["num_inference_steps"] == figures["many_step"]["num_inference_steps"]
    command = ["synthesize", "--model", str(out), "--count", "8", "--out"]
    assert main([*command, str(tmp_path / "data")]) == 0
    used = yaml.safe_load((tmp_path / "data" / "config.yaml").read_text())
    assert (used["num_inference_steps"], used["guidance_scale"], used["noise_scale"]) == (2, 1.0, 1.0)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "other"), "--guidance-scale", "1.5"]) == 2
    assert "guidance_scale must be 1.0 or left out for a few-step generator" in capsys.readouterr().err


def test_time_memory_and_disk_are_counted(tmp_path):
    """Seconds where every rate is 1, by hand: 100 steps draw twice 8 batches, of 2 calls or, guided, of 4 an image."""
    one = time_estimate.Rates(*[1.0] * len(dataclasses.fields(time_estimate.Rates)))
    options = {"generator_batch_size": 8, "few_step_training": 100, "trial_images": 64, "student_batch_size": 32}
    many = new_context(tmp_path, counts=(20, 9, 10), **options)
    few = dataclasses.replace(many, config=dataclasses.replace(many.config, few_steps=1))
    before, after = time_estimate.stages(many, one), time_estimate.stages(few, one)
    short = 1 + 64 + (64 + 9)
    assert after["few_step"] == 100 * 8 + 2 * 8 * 8 * 3 + 2 + short
    assert before["gkd"] - after["gkd"] == 3 * 128 * (3 - 1)
    sizes = networks.sizes(few)
    disk, memory = (memory_and_disk.stages(needs(few, sizes)) for needs in NEEDS)
    assert disk["few_step"] == sizes.generator.state
    assert memory["few_step"] == 5 * sizes.generator.state + 8 * sizes.generator.saved + 4 * 64 * 8 * 8 * 2
    assert "few_step" not in memory_and_disk.stages(memory_and_disk.memory_needs(many, sizes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "5m"}, "few_steps must be 0 with budget"),
        ({"generator": "images"}, "few_steps must be 0 with generator, a given one"),
        ({"generator_objective": "epsilon"}, "few_steps must be 0 with generator_objective epsilon"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(options, words):
    with pytest.raises(UserError, match=f"run: {words}, .*got 2"):
        RecycleConfig(**{**preset("toy"), "few_steps": 2, **options})
