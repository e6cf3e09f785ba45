"""The lines of the stages: where a run is, what it took, and what is left in proportion to the operations."""

import logging

import pytest
import torch

import kr_fast
from kr_fast.data import Dataset, Split
from kr_fast.recycling import preflight, stage_progress
from kr_fast.recycling.context import Context
from kr_fast.recycling.presets import preset
from kr_fast.runtime.log import logger
from kr_fast.runtime.state import Runtime
from kr_fast.runtime.storage.journal import Journal

NAMES = ["data", "teacher", "generator", "report"]
WORK = {"teacher": 2e9, "generator": 6e9, "report": 3.0}


@pytest.mark.parametrize(
    ("name", "seconds", "expected"),
    [
        ("data", {}, "[1/4] data"),
        ("teacher", {"data": 0.5}, "[2/4] teacher, 0.5 s so far"),  # nothing that has work was timed
        ("generator", {"data": 0.5, "teacher": 60.0}, "[3/4] generator, 60.5 s so far, about 3.0 min left"),
        (
            "report",
            {"data": 0.5, "teacher": 60.0, "generator": 240.0},
            "[4/4] report, 5.0 min so far, about 0.0 s left",
        ),
    ],
)
def test_a_line_says_what_is_left_at_the_pace_so_far(name, seconds, expected):
    assert stage_progress.line(NAMES, name, WORK, seconds) == expected


def test_lines_are_logged_unless_the_command_is_quiet(caplog):
    asked = []
    plan = stage_progress.StageProgress(NAMES, lambda: asked.append(1) or WORK)
    with caplog.at_level(logging.WARNING, logger.name):
        plan.begin("teacher", {})
    assert (caplog.messages, asked) == ([], [])
    with caplog.at_level(logging.INFO, logger.name):
        plan.begin("teacher", {})
        plan.begin("generator", {"teacher": 1.0})
    assert caplog.messages == ["[2/4] teacher", "[3/4] generator, 1.0 s so far, about 3.0 s left"]
    assert asked == [1]


def test_with_a_budget_what_is_left_is_what_is_planned(caplog):
    """Seconds by stage, which change while a run goes on; not the pace of the Teacher, a much smaller network."""
    ahead = {"teacher": 5.0, "generator": 90.0, "report": 2.0}
    plan = stage_progress.StageProgress(NAMES, lambda: WORK, lambda: ahead)
    with caplog.at_level(logging.INFO, logger.name):
        plan.begin("data", {})
        plan.begin("generator", {"data": 1.0, "teacher": 60.0})
        ahead["generator"], ahead["report"] = 0.0, 3.0
        plan.begin("report", {"data": 1.0, "teacher": 60.0, "generator": 29.0})
    assert caplog.messages == [
        "[1/4] data, about 97.0 s left",
        "[3/4] generator, 61.0 s so far, about 92.0 s left",
        "[4/4] report, 90.0 s so far, about 3.0 s left",
    ]


def test_work_follows_the_operations(tmp_path):
    """Each step is as much work as another one; the Teacher's by hand: epochs x images x 3 passes."""
    split = Split(torch.zeros(64, 8, 8, 1, dtype=torch.uint8), torch.arange(64) % 4)
    data = Dataset("set", ("a", "b", "c", "d"), split, split, split)

    def work(**changes):
        values = {key: v for key, v in preset("toy").items() if key not in changes}
        config = kr_fast.RecycleConfig(**values, **changes)
        runtime = Runtime(0, 1, torch.device("cpu"), "no")
        return preflight.work(Context(config, tmp_path, runtime, data, Journal(tmp_path)))

    assert work(generator=("images.npy",)) == {}  # of one that is given no more is known than its images
    once, twice, thrice = (work(generator_steps=steps) for steps in (12, 24, 36))
    steps = twice["generator"] - once["generator"]  # the rest measures memorisation, alike in all
    assert thrice["generator"] - twice["generator"] == pytest.approx(steps)
    assert 0 < steps < once["generator"]
    assert twice["teacher"] == pytest.approx(once["teacher"])
    model = kr_fast.models.classifier("resnet8", num_classes=4, in_channels=1, width=4, image_size=8)
    multiplications = []

    def count(part, inputs, output):
        outputs = output[0].numel() if output.ndim == 4 else 1
        multiplications.append(outputs * (part.weight[0].numel() if output.ndim == 4 else part.weight.numel()))

    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            part.register_forward_hook(count)
    model.eval()(torch.zeros(1, 1, 8, 8))
    each = 2 * sum(multiplications)
    # 2 epochs of 64 images in 3 passes, and 2 looks at 64 validation images.
    assert once["teacher"] == pytest.approx(2 * 64 * 3 * each + 2 * 64 * each)
