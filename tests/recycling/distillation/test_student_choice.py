"""The Student's period: the latest of the best ones on validation, by accuracy or by AUC."""

import pytest
import torch
from torch import nn

from kr_fast.data import Dataset, Split
from kr_fast.ensemble import score
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.runtime import state
from kr_fast.runtime.storage.journal import Journal

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, CLASSES, PERIODS = 24, 3, 10


@pytest.mark.parametrize("by", ["accuracy", "auc"])
def test_the_period_is_the_latest_of_the_best(by, tmp_path):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % CLASSES
    images = (torch.randint(0, 200, (COUNT, 8, 8, 1), generator=draw) + 15 * labels[:, None, None, None]).byte()
    data = Dataset("made", tuple("abc"), *[Split(images, labels)] * 3)
    # A rate at which the most accurate period is not the last one.
    options = {"out": str(tmp_path), "student_choose": by, "student_learning_rate": 0.2, "labels": "class"}
    run = Context(RecycleConfig(**{**preset("toy"), **options}), tmp_path, state.current(), data, Journal(tmp_path))
    student, teacher = run.seeded("resnet8", 4, "student"), nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).eval()
    sets = (torch.arange(COUNT), labels, images)
    schedule = Schedule((PERIODS,), COUNT, 1)
    done = gkd.distil(run, teacher, student, lambda _: sets, schedule, confidence=0.0, seed=0)
    scores = torch.tensor(done.val_score, dtype=torch.float64)
    assert done.best_period == int((scores == scores.max()).nonzero()[-1])
    assert score(student, data.val, by) == pytest.approx(done.val_score[done.best_period], abs=1e-6)
    assert score(student, data.val) == pytest.approx(done.val_accuracy[done.best_period], abs=1e-6)
    assert (done.val_score == done.val_accuracy) == (by == "accuracy")
    assert len(set(done.val_score)) > 1
