"""Choices on validation: settings that are drawn, what replaces the configured one, and searches that are continued."""

import dataclasses
import json
import math

import pytest
import torch
from toy_runs import new_context

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.preflight import time_estimate
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.score_error import score_error
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.recycling.stages.generation import checkpoints, tuning
from kr_fast.recycling.stages.generation.sampling import Sampling, default_sampling, network_calls
from kr_fast.recycling.stages.generation.search_space import drawn_settings, row
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import Sampler

WIDE = {
    "tune_noise_scale": (0.8, 1.3),
    "tune_guidance_scale": (2.0,),
    "tune_num_inference_steps": (6,),
    "tune_confidence": (),
    "tune_guidance_interval": (0.4, 0.6),
    "tune_solver": ("heun", "dpm++"),
    "tune_student_epochs": (2, 5),
}


def scored(tmp_path, monkeypatch, value, **options):
    """A run at its tuning whose short Students score ``value(sampling, length, repeat)``, and the trials so far."""
    run, asked = new_context(tmp_path, (20, 100, 10), tune_trials=8, **options), []
    results = {"checkpoints": {"chosen": 12}, "generator": {"checkpoints": [9, 12]}}
    monkeypatch.setattr(run, "result", results.get)
    monkeypatch.setattr(teacher, "load", lambda context: None)

    def trial(context, model, sampling, length=1, repeat=0):
        asked.append((sampling, length, repeat))
        return value(sampling, length, repeat)

    monkeypatch.setattr(gkd, "trial", trial)
    return run, asked


def test_settings_are_drawn_between_the_values(tmp_path):
    c = RecycleConfig(**WIDE)
    usual = default_sampling(new_context(tmp_path, **WIDE, tune_trials=8), 12)
    settings = drawn_settings(c, dataclasses.replace(usual, num_inference_steps=5), 64, 3)
    assert settings == drawn_settings(c, dataclasses.replace(usual, num_inference_steps=5), 64, 3)
    assert settings != drawn_settings(c, dataclasses.replace(usual, num_inference_steps=5), 64, 4)
    assert len(set(settings)) == len(settings) == 64
    ranges = {"noise_scale": (0.8, 1.3), "guidance_scale": (1, 2), "num_inference_steps": (5, 6)}
    for name, (low, high) in ranges.items():
        values = [getattr(each, name) for each in settings]
        assert low <= min(values) < low + 0.1 * (high - low) + 1e-9
        assert high - 0.1 * (high - low) - 1e-9 < max(values) <= high
    assert {each.solver for each in settings} == {"euler", "heun", "dpm++"}
    assert {each.passes for each in settings} == {0, 2, 5}  # 0: as configured
    assert {each.confidence for each in settings} == {0.0}
    assert all(0 <= each.guidance_interval[0] <= 0.4 and 0.6 <= each.guidance_interval[1] <= 1 for each in settings)
    assert (
        drawn_settings(
            RecycleConfig(
                **{
                    f"tune_{name}": ()
                    for name in ("noise_scale", "guidance_scale", "num_inference_steps", "confidence")
                }
            ),
            usual,
            9,
            0,
        )
        == []
    )


def test_drawn_settings_whose_guidance_has_no_step_are_left_out(tmp_path):
    options = {"num_inference_steps": 2, "tune_num_inference_steps": (3,), "guidance_scale": 2.0, "tune_trials": 64}
    options |= {"guidance_interval": (0.35, 0.65), "tune_guidance_interval": (0.4, 0.7)}
    c = RecycleConfig(**options)
    settings = drawn_settings(c, default_sampling(new_context(tmp_path, **options), 12), 64, 3)
    assert 32 < len(settings) < 64
    for each in settings:
        first, last = each.guidance_interval
        assert any(first <= step / each.num_inference_steps < last for step in range(each.num_inference_steps))


def test_a_row_holds_a_value_of_zero_and_the_configured_size(tmp_path):
    options = {"confidence": 0.5, "tune_confidence": (0.0,), "tune_images": (64,)}
    run = new_context(tmp_path, **options)
    shown = row(run.config, dataclasses.replace(default_sampling(run, 12), confidence=0.0))
    assert (shown["confidence"], shown["images"]) == (0.0, run.config.images)


def test_a_better_setting_replaces_the_usual_one(tmp_path, monkeypatch):
    """Scores rise with sigma by much more than validation's noise."""
    run, asked = scored(tmp_path, monkeypatch, lambda s, *_: 0.5 + 0.4 * (s.noise_scale - 1), tune_noise_scale=(2.0,))
    result = tuning.run(run)
    chosen = Sampling(**result["sampling"])
    assert chosen == max((each for each, *_ in asked), key=lambda each: each.noise_scale)
    decision = result["decision"]
    assert decision["replaced"]
    assert decision["noise"] == pytest.approx(math.sqrt(0.5 * 0.5 / 100))
    assert decision["best"] - decision["usual"] == pytest.approx(0.4 * (chosen.noise_scale - 1))
    rows = result["rows"]
    assert [(row["round"], row["length"]) for row in rows] == [(1, 1)] * 8 + [(2, 2)] * 4 + [(3, 4)] * 6
    assert [row["repeat"] for row in rows] == [0] * 14 + [1, 2, 1, 2]
    assert all(row["chosen"] == (row["noise_scale"] == chosen.noise_scale) for row in rows)
    assert sum(count for count, _ in tuning.trials_of(run.config, default_sampling(run, 12))) == len(rows)


@pytest.mark.parametrize("by", ["noise", "luck"])
def test_what_is_not_better_beyond_the_noise_does_not(tmp_path, monkeypatch, by):
    """Less than a standard error (.05 for .5 of 100 images), or better in the search but not with other seeds."""

    def value(sampling, length, repeat):
        gain = 0.04 if by == "noise" else 0.3 * (repeat == 0)
        return 0.5 + gain * (sampling.noise_scale > 1)

    run, _ = scored(tmp_path, monkeypatch, value)
    result = tuning.run(run)
    assert not result["decision"]["replaced"]
    assert Sampling(**result["sampling"]) == default_sampling(run, 12)


def test_the_usual_setting_is_not_tried_against_itself(tmp_path, monkeypatch):
    run, asked = scored(tmp_path, monkeypatch, lambda *_: 0.5)  # of equals the usual one
    result = tuning.run(run)
    assert len(asked) == 8 + 4 + 2
    assert "decision" not in result
    assert Sampling(**result["sampling"]) == default_sampling(run, 12)


def test_a_stopped_search_is_continued(tmp_path, monkeypatch):
    def value(sampling, length, repeat):
        return 0.5 + 0.3 * (sampling.noise_scale - 1) + 0.01 * length

    whole, _ = scored(tmp_path / "whole", monkeypatch, value)
    expected = tuning.run(whole)

    def stops(*arguments):
        if len(asked) == 10:
            raise KeyboardInterrupt
        return value(*arguments)

    run, asked = scored(tmp_path / "run", monkeypatch, stops)
    with pytest.raises(KeyboardInterrupt):
        tuning.run(run)
    run, again = scored(tmp_path / "run", monkeypatch, value)
    result = tuning.run(run)
    assert again == asked[9:] + again[1:]  # the tenth was not finished
    strip = lambda rows: [{**row, "seconds": 0} for row in rows]  # noqa: E731
    assert (result["sampling"], strip(result["rows"])) == (expected["sampling"], strip(expected["rows"]))
    log = json.loads((run.folder.state / "trials.json").read_text())
    assert all(each["seconds"] >= 0 for each in log.values())
    assert len(log) == len(result["rows"])


def test_checkpoints_and_averages_are_halved(tmp_path, monkeypatch):
    """Of equal scores the later checkpoint stays, with its usual average before those of other lengths."""
    options = {"ema_lengths": (0.05, 0.1), "checkpoint_halving": True}
    run, asked = scored(tmp_path, monkeypatch, lambda *_: 0.5, **options)
    result = checkpoints.run(run)
    assert (result["chosen"], result["ema_length"]) == (12, 0.0)
    assert [(row["step"], row["ema_length"]) for row in result["rows"] if row["chosen"]] == [(12, 0.0)]
    assert [(s.checkpoint, s.ema_length, length) for s, length, _ in asked] == [
        *((step, length, 1) for step in (9, 12) for length in (0.1, 0.05, 0.0)),
        *((12, length, 2) for length in (0.1, 0.05, 0.0)),
        *((12, length, 4) for length in (0.05, 0.0)),
    ]
    best = lambda s, *_: 0.5 + 0.1 * (s.checkpoint == 9 and s.ema_length == 0.1)  # noqa: E731
    run, _ = scored(tmp_path / "best", monkeypatch, best, **options)
    result = checkpoints.run(run)
    assert (result["chosen"], result["ema_length"]) == (9, 0.1)


def test_halving_and_trials_are_in_the_time_estimate(tmp_path):
    """At one second a training image of the Student: 64 of them in a unit of length, and nothing else."""
    zero = dict.fromkeys((field.name for field in dataclasses.fields(time_estimate.Rates)), 0.0)
    rates = time_estimate.Rates(**{**zero, "student": 1.0})
    run = new_context(tmp_path, tune_trials=8, ema_lengths=(0.05, 0.1), checkpoint_halving=True)
    seconds = time_estimate.stages(run, rates)
    assert seconds["checkpoints"] == 64 * (6 + 3 * 2 + 2 * 4)
    assert seconds["tuning"] == pytest.approx(64 * (8 + 4 * 2 + 2 * 4 + 4 * 4 - 1))
    assert time_estimate.asked(run).tuned == 8 + 4 * 2 + 2 * 4 + 4 * 4 - 1  # short Students that a budget has to pay


def test_fewer_passes_draw_more_images(tmp_path):
    """One pass in place of three takes three times as many sets; the estimate is the mean of both."""
    zero = dict.fromkeys((field.name for field in dataclasses.fields(time_estimate.Rates)), 0.0)
    rates = time_estimate.Rates(**{**zero, "sampled": 1.0})
    options = {"student_epochs": 3, "tune_guidance_scale": (), "tune_num_inference_steps": ()}
    seconds = [
        time_estimate.stages(new_context(tmp_path, **options, tune_student_epochs=tried), rates)["gkd"]
        for tried in ((), (1,))
    ]
    assert seconds[1] == 2 * seconds[0] > 0


def test_noise_of_an_auc_is_that_of_its_rarest_class(tmp_path):
    run = new_context(tmp_path, (20, 30, 10), classes=3, student_choose="auc")
    run.data.val.labels[:] = torch.tensor([0] * 4 + [1] * 20 + [2] * 6)
    assert score_error(run, 0.8) == pytest.approx(math.sqrt(0.8 * 0.2 / 4))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++"])
@pytest.mark.parametrize("objective", ["flow", "epsilon", "v_prediction"])
def test_solvers_end_at_the_one_image_that_there_is(solver, objective):
    """Of a network that knows a single image, which each solver has to draw; its calls are counted."""
    if solver == "heun" and objective != "flow":
        with pytest.raises(UserError, match="solver must be euler or dpm"):
            RecycleConfig(solver=solver, generator_objective=objective)
        return
    image, calls = torch.linspace(-0.8, 0.8, 64).view(1, 1, 8, 8), []
    sampling = Sampling(1, 5, 2.0, 1.0, 0.0, (0.2, 0.7), solver)
    alphas = None if objective == "flow" else sampling.scheduler(objective).alphas_cumprod

    def network(x, t, class_labels):
        calls.append(len(x))
        if objective == "flow":
            return (x - image) / (t / 1000)
        a = alphas[int(t)]
        noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        return noise if objective == "epsilon" else (noise - (1 - a).sqrt() * x) / a.sqrt()

    options = {"guidance_scale": 2.0, "guidance_interval": sampling.guidance_interval, "num_classes": 4}
    sampler = Sampler(
        network, sampling.scheduler(objective), 5, seed=0, micro_batch=3, image_shape=(1, 8, 8), **options
    )
    drawn = sampler(torch.arange(3), torch.arange(3))
    assert sum(calls) == 3 * network_calls(sampling)
    expected = ((image[0, 0] + 1) * 127.5).round()
    assert float((drawn[..., 0].float() - expected).abs().max()) <= 2  # of 255 levels


def test_a_small_error_in_pure_noise_stays_small_with_dpm():
    """Of images whose pixels have a standard deviation of 0.5, by the noise to be expected in each and 0.01 more."""
    scheduler = Sampling(1, 5, 1.0, 1.0, 0.0, solver="dpm++").scheduler("epsilon")

    def network(x, t, class_labels):
        a = scheduler.alphas_cumprod[int(t)]
        return (1 - a).sqrt() * x / (0.25 * a + 1 - a) + 0.01

    sampler = Sampler(network, scheduler, 5, seed=0, micro_batch=8, num_classes=4, image_shape=(1, 8, 8))
    pixels = sampler(torch.arange(8), torch.arange(8) % 4).double() / 127.5 - 1
    assert abs(float(pixels.mean())) < 0.4
    assert 0.3 < float(pixels.std()) < 0.6


@pytest.mark.parametrize(
    ("images", "passes", "expected"),
    [
        (0, 0, (2, 64, 3)),
        (32, 0, (4, 32, 3)),
        (0, 1, (6, 64, 1)),
        (0, 6, (1, 64, 6)),
        (4096, 0, (1, 128, 3)),
        (0, 99, (1, 32, 12)),
    ],
)
def test_sets_of_other_sizes_take_as_many_steps(images, passes, expected):
    """Twelve steps of 32 images."""
    schedule = Schedule((2,), 64, 3).resized(images, passes, 32)
    assert (schedule.periods, schedule.images, schedule.epochs) == expected
    assert schedule.periods * schedule.epochs * (schedule.images // 32) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must be two rising shares in [0, 1], got [0.5, 0.5]"),
        ({"tune_guidance_interval": (0.0, 0.5), "tune_guidance_scale": (1.0,)}, "interval must be left out where guid"),
        ({"tune_guidance_interval": (0.5,)}, "tune_guidance_interval must be empty or two rising shares"),
        ({"guidance_interval": (0.0, 0.3), "tune_guidance_interval": (0.4, 0.6), "tune_trials": 4}, "with tune_trials"),
        ({"tune_trials": 1}, "tune_trials must be 0 or at least 2"),
        ({"solver": "dopri5"}, "solver must be one of euler, heun, dpm++, got dopri5"),
        ({"ema_lengths": (0.1, 0.1)}, "ema_lengths must not repeat"),
        ({"ema_lengths": (0.25,)}, "ema_lengths must be in [0.03, 0.2], got 0.25"),
        ({"budget": "1h", "ema_lengths": (0.1,)}, "ema_lengths must be left out with budget"),
        ({"budget": "1h", "checkpoint_halving": True}, "checkpoint_halving must be left out with budget"),
        ({"generator": "a", "ema_lengths": (0.1,)}, "ema_lengths must be left out with generator, a given one"),
        ({"budget": "1h", "tune_images": (64,)}, "tune_images must be left out with budget"),
        ({"generator": "images", "solver": "dpm++"}, "solver must be left out with generator, a given one"),
        ({"generator": "images", "tune_solver": ("heun",)}, "tune_solver must be left out with generator, a given one"),
    ],
)
def test_options_that_cannot_work_together(options, words):
    with pytest.raises(UserError) as refused:
        RecycleConfig(**options)
    assert words in str(refused.value)
