"""Every option of every command, and of training and augmentation behind it, is in its range or refused by name."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.benchmarks.config import BenchConfig
from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.recycling.config import RecycleConfig
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis.job import SynthesizeConfig


def _is_number(config, field):
    kind = typing.get_type_hints(config)[field.name]
    return kind in (int, float, tuple[int, ...], tuple[float, ...])


GIVEN = {AuditConfig: {"model": "m:make", "checkpoint": ("c",), "data": "d"}}  # without which there is no audit
CONFIGS = (RecycleConfig, TrainConfig, Augment, AuditConfig, SynthesizeConfig, BenchConfig)
NUMBERS = [(config, field) for config in CONFIGS for field in dataclasses.fields(config) if _is_number(config, field)]
HOSTILE = (math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.0, 1e-300, 0.5, 1, 3, 1e9, 1e30, 1e38, 10**12, 2**63, 10**400)


def inside(limits, value):
    """Whether ``value`` lies in the range that ``option`` was given, written out apart from the code."""
    return (
        (limits["least"] is None or value >= limits["least"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["most"] is None or value <= limits["most"])
        and (limits["below"] is None or value < limits["below"])
    )


@settings(max_examples=400, deadline=None)
@given(
    where=st.sampled_from(NUMBERS),
    value=st.one_of(st.sampled_from(HOSTILE), st.floats(), st.integers(), st.floats(0, 2), st.integers(0, 300)),
)
def test_every_number_is_in_its_range_or_refused_by_name(where, value):
    config, field = where
    try:
        made = config(**GIVEN.get(config, {}), **{field.name: (value,) if isinstance(field.default, tuple) else value})
    except UserError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert field.name in refusal
        assert "\n" not in refusal
        return
    result = getattr(made, field.name)
    result = result[0] if isinstance(result, tuple) else result
    assert result == value
    assert math.isfinite(result)
    assert inside(field.metadata["limits"], value)


def test_every_number_of_a_run_has_both_ends():
    """Nothing that a run takes can overflow a float32."""
    for field in dataclasses.fields(RecycleConfig):
        if (RecycleConfig, field) in NUMBERS and field.name != "seed":
            limits = field.metadata["limits"]
            assert limits["least"] is not None or limits["above"] is not None, field.name
            assert (limits["most"] or limits["below"]) is not None, field.name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"soft_weight": 0, "hard_weight": 0}, "soft_weight and hard_weight must be at least 0.001 in all"),
        ({"soft_weight": 1e-300}, "soft_weight and hard_weight must be at least 0.001 in all"),
        ({"checkpoints": 3, "generator_steps": 5}, "checkpoints must be at most 2, the steps in the second half"),
        (
            {"teacher_learning_rate": 4, "teacher_weight_decay": 0.3},
            "below 1 / teacher_learning_rate, 0.25, got 0.3",
        ),
        ({"student_learning_rate": 10, "student_weight_decay": 1}, "student_weight_decay must be below"),
        ({"labels": "top2"}, "labels must be one of soft, top1, class, got top2"),
        (
            {"labels": "top1", "temperature": 2},
            "temperature must be left out with labels top1, where it does nothing, got 2.0",
        ),
        ({"labels": "class", "hard_weight": 1}, "hard_weight must be left out with labels class"),
        ({"teacher_choose": "recall"}, "teacher_choose must be one of accuracy, loss, auc, got recall"),
        ({"student_choose": "loss"}, "student_choose must be one of accuracy, auc, got loss"),
        ({"student_choose": "auc", "budget": "1h"}, "student_choose must be accuracy with a budget, which compares"),
        ({"generator_ema": 0.9, "budget": "1h"}, "generator_ema must be left out with budget, whose average of the"),
        ({"labels": "top1", "loss": "dkd"}, "loss must be left out with labels top1"),
        ({"loss": "dkd", "soft_weight": 2}, "soft_weight must be left out with loss dkd, where it does nothing"),
        ({"dkd_beta": 2}, "dkd_beta must be left out with loss kl, where it does nothing, got 2.0"),
        ({"loss": "dkd", "dkd_alpha": 0, "dkd_beta": 0}, "dkd_alpha and dkd_beta and hard_weight must be at least 0.0"),
        ({"student_cutmix": 0.001}, "student_cutmix must be 0 or at least 0.01, got 0.001"),
        ({"ablation": True, "labels": "class"}, "ablation must be left out with labels class, which it compares"),
        ({"ablation": True, "budget": "1h"}, "ablation must be left out with budget, in which three further Students"),
        ({"fixed_images": True, "budget": "1h"}, "fixed_images must be left out with budget, which shares the time"),
        ({"teacher_mixup": 0.001}, "teacher_mixup must be 0 or at least 0.01, got 0.001"),
        ({"label_dropout": 0}, "label_dropout must be above 0, which trains the null class, unless guidance_scale"),
        ({"label_dropout": 0, "tune_guidance_scale": (), "guidance_scale": 2}, "got 0.0 beside 2"),
        (
            {"guidance_interval": (0.3, 0.35), "num_inference_steps": 10},
            "guidance_interval must hold one of the 8 solver steps, the nearest of which is at 3 / 8, got [0.3, 0.35]",
        ),
        (  # the 12 steps that lead over the 4 of the few-step generator
            {"guidance_interval": (0.3, 0.32), "num_inference_steps": 10, "few_steps": 4}
            | {"tune_num_inference_steps": ()},
            "guidance_interval must hold one of the 12 solver steps, the nearest of which is at 4 / 12",
        ),
        (
            {"tune_guidance_interval": (0.37, 0.39), "num_inference_steps": 8, "solver": "heun"}
            | {"generator_objective": "flow"},
            "tune_guidance_interval must hold one of the 15 solver steps, the nearest of which is at 6 / 15",
        ),
        ({"out": ""}, "out must be the name of a folder, got ''"),
        ({"data": "a\0b"}, "data must be the name of a folder or file, got 'a\\x00b'"),
        ({"teacher_epochs": 2.5}, "teacher_epochs must be of type int, got 2.5"),
        ({"generator_widths": 32}, "generator_widths must be a list, got 32"),
        ({"student_flip": 1}, "student_flip must be of type bool, got 1"),
        ({"num_shadows": 10**400}, "num_shadows must be in [0, 1000000], got an integer of 1329 bits"),
    ],
)
def test_values_that_cannot_work_together(options, words):
    with pytest.raises(UserError) as refused:
        RecycleConfig(**options)
    assert str(refused.value).startswith("run: ")
    assert words in str(refused.value)


def test_numbers_and_paths_of_other_libraries(tmp_path):
    """A notebook's numpy numbers and paths end in the YAML file as plain values."""
    numbers = {"temperature": np.float32(2), "images": np.int64(64), "student_flip": np.True_}
    lists = {"generator_widths": np.array([8, 16]), "tune_confidence": [np.float64(0.5)]}
    made = RecycleConfig(out=tmp_path, data=tmp_path / "x.npz", **numbers, **lists)
    assert yaml.safe_load(yaml.safe_dump(made.record())) == made.record()
    assert (made.temperature, made.images, made.student_flip, made.generator_widths) == (2.0, 64, True, (8, 16))
    assert RecycleConfig(label_dropout=0, tune_guidance_scale=()).guidance_scale == 1
