"""What cannot be together with epsilon is refused, and what follows from it is there without being asked for."""

import argparse
import dataclasses
from decimal import Context, Decimal

import numpy as np
import pytest
import torch
from cli_cases import refused
from toy_runs import new_context

from kr_fast.cli import options
from kr_fast.data.pixel_range import OVER_ALL
from kr_fast.recycling.commands import DISTIL, GENERATOR
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.dp import checks, ledger, spending
from kr_fast.recycling.dp.options import UNPAID
from kr_fast.recycling.pipeline import distil_config, train_generator
from kr_fast.recycling.presets import implied, preset
from kr_fast.recycling.several_seeds import seeds_of
from kr_fast.runtime.errors import UserError

PRIVATE = preset("toy,guaranteed")


def private(**changes):
    return RecycleConfig(**{**PRIVATE, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune_trials": 4}, "tune_trials must be 0 with epsilon, as no choice may read private images"),
        ({"tune_noise_scale": (1.1,)}, "tune_noise_scale must be left out with epsilon"),
        ({"checkpoints": 2}, "checkpoints must be 1 with epsilon"),
        ({"budget": "30m"}, "budget must be left out with epsilon"),
        ({"teacher_mixup": 1.0}, "teacher_mixup must be 0.0 with epsilon, as a mixed image"),
        ({"student_choose": "auc"}, "student_choose must be accuracy with epsilon"),
        ({"audit_generator": "retrained"}, "audit_generator must be shared with epsilon"),
        ({"log_with": ("wandb",)}, "log_with must be left out with epsilon"),
        ({"teacher_arch": "resnet8"}, "teacher_arch must be one of resnet8-gn, .* as BatchNorm mixes the records"),
        ({"teacher": "pkg.mod:factory"}, "teacher must be left out with epsilon, as a given one was trained on"),
        ({"generator": ("runs/other",)}, "generator must be left out with epsilon, as a given one was trained on"),
        ({"dp_seed": 1}, "dp_seed must be left out without not_private: noise that can be drawn again protects"),
        ({"not_private": True}, "not_private must be left out without dp_seed"),
        ({"epsilon": 0.0, "delta": 1e-6}, "delta must be left out without epsilon"),
    ],
)
def test_options_that_are_not_paid_for(changes, words):
    with pytest.raises(UserError, match=f"run: {words}"):
        private(**changes)


def test_a_seed_is_allowed_with_the_words_for_it():
    assert private(dp_seed=1, not_private=True).dp_seed == 1


def test_epsilon_brings_its_values(tmp_path):
    """What is given by itself counts more, and is refused where it cannot be paid for."""
    given = {"epsilon": 3.0, "teacher_arch": "resnet8"}
    values = implied(given)
    assert values["teacher_arch"] == "resnet8-gn"
    assert {name: values[name] for name in UNPAID} == {name: value for name, (value, _) in UNPAID.items()}
    assert implied({"epsilon": 0.0}) == implied({}) == {}
    parser = argparse.ArgumentParser()
    options.add_preset(parser)
    options.add_flags(parser, RecycleConfig)
    arguments = parser.parse_args(["--preset", "small", "--epsilon", "2", "--out", str(tmp_path)])
    config = options.config_from(arguments, RecycleConfig, "run", preset, implied=implied)
    assert (config.epsilon, config.teacher_arch, config.checkpoints) == (2.0, "resnet14-gn", 1)
    assert config.generator_widths == (32, 64, 64)  # of the preset


def test_flags_that_are_not_paid_for_are_refused(tmp_path, capsys):
    flags = ("--epsilon", 8, "--tune-noise-scale", 1.1, "--out", tmp_path / "run")
    assert "tune_noise_scale must be left out with epsilon" in refused(capsys, "run", *flags)
    assert not (tmp_path / "run").exists()


def test_other_commands_and_several_seeds_do_not_drop_it(tmp_path, capsys):
    for command in (GENERATOR, DISTIL):
        with pytest.raises(UserError, match=f"{command.name}: epsilon must be left out"):
            command.of(private())
    with pytest.raises(UserError, match="generator: epsilon must be left out"):
        train_generator(private())
    with pytest.raises(UserError, match="be given"):
        distil_config(private())
    with pytest.raises(UserError, match="run: seeds must be left out with epsilon, which each of the runs would spend"):
        seeds_of(private(out=str(tmp_path / "run")), 3)
    line = refused(capsys, "generator", "--preset", "small,guaranteed", "--out", tmp_path / "g")
    assert "generator: epsilon must be left out" in line


@pytest.fixture
def no_search(monkeypatch):
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: 2.0)


def context(tmp_path, **changes):
    sizes = {"teacher_batch_size": 8, "generator_batch_size": 8}
    return new_context(tmp_path, **{**PRIVATE, **sizes, **changes, "out": str(tmp_path / "run")})


@pytest.mark.usefixtures("no_search")
def test_delta_above_one_in_so_many_records_is_noted(tmp_path, caplog):
    notes = checks.check(context(tmp_path, delta=0.1))
    assert "delta is 0.1, above 1 / 20 training images: a mechanism that publishes each" in notes[0]
    assert "delta 0.1 is above 1 / records" in caplog.text
    run = context(tmp_path)
    assert checks.check(run) == []
    assert checks.describe(run) == [
        "privacy: epsilon 8 at delta 1e-05, class counts noised",
        "privacy: teacher: 5 steps of 8 images on average, noise multiplier 2",
        "privacy: generator: 12 steps of 8 images on average, noise multiplier 2",
    ]


@pytest.mark.usefixtures("no_search")
def test_data_that_no_noise_covers(tmp_path):
    run = context(tmp_path)
    run.data = dataclasses.replace(run.data, notes=(f"windowed to [3, 9], their 0.5 and 99.5 {OVER_ALL}",))
    with pytest.raises(UserError, match="data must hold pixels of a known range with epsilon"):
        checks.check(run)
    with pytest.raises(UserError, match="teacher_batch_size must be at most the 20 training images"):
        checks.check(context(tmp_path, teacher_batch_size=21))
    run = context(tmp_path)
    grouped = dataclasses.replace(run.data.train, groups=torch.arange(20) // 2)
    run.data = dataclasses.replace(run.data, train=grouped)
    assert "epsilon is for one image: of a patient" in checks.check(run)[0]


def test_a_target_that_no_noise_reaches(tmp_path):
    with pytest.raises(UserError, match="epsilon must be at least"):
        ledger.noise(context(tmp_path, epsilon=1e-4, teacher_batch_size=20, teacher_epochs=1))  # one step, of all


def test_steps_and_rates_follow_from_the_options(tmp_path):
    run = context(tmp_path, teacher_epochs=3, generator_steps=7)
    uses = spending.trainings(run.config, 20)
    assert uses["teacher"] == spending.Spending(8, 0.4, 8.0)  # 3 passes over 20 images, 8 at a time
    assert uses["generator"] == spending.Spending(7, 0.4, 8.0)


def test_discrete_laplace():
    """Its probabilities, and that it comes from no seed."""
    epsilon, count = 0.7, 20_000
    values = np.array(spending.discrete_laplace(count, epsilon, 5))
    for k in (0, 1, -1, 3):
        expected = (1 - np.exp(-epsilon)) / (1 + np.exp(-epsilon)) * np.exp(-epsilon * abs(k))
        error = 5 * (expected * (1 - expected) / count) ** 0.5
        assert abs((values == k).mean() - expected) < error, k
    assert spending.discrete_laplace(50, 0.01) != spending.discrete_laplace(50, 0.01)
    for epsilon in (1e-6, 0.02, 0.4, 3.0, 50.0):  # one count more or less: at most e^epsilon times as likely
        least = (-Decimal(epsilon)).exp(Context(prec=60))
        assert least <= Decimal(spending.heads(epsilon)) / 2**64 < least + Decimal(2) ** -51


@pytest.mark.parametrize("kind", ["noised", "public", "unused"])
def test_class_counts(tmp_path, kind):
    changes = {"label_plan": "balanced"} if kind == "unused" else {"class_counts": kind}
    run = context(tmp_path, epsilon=0.1, **changes)
    drawn = [spending.class_counts(run) for _ in range(5)]
    assert {each[0] for each in drawn} == {kind}
    values = [each[1] for each in drawn]
    assert all(min(each) >= 0 and sum(each) > 0 for each in values)
    if kind == "noised":  # of scale 200
        assert len({tuple(each) for each in values}) > 1
    else:
        assert values == [{"public": [10, 10], "unused": [1, 1]}[kind]] * 5
