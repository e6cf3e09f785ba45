"""The Teacher that a user brings: a factory or a file of weights, asked before it is used."""

import sys

import pytest
import torch

from kr_fast import data
from kr_fast.models import classifier
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import Journal

FACTORIES = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight  # tied

    def forward(self, x):
        return {"logits": self.head(self.second(self.first(x.flatten(1))).relu())}

class Extra(Wrapped):
    def get_extra_state(self):
        return "words"

    def set_extra_state(self, state):
        pass
"""


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture
def context(digits, tmp_path):
    def make(given):
        config = RecycleConfig(out=str(tmp_path / "run"), teacher=str(given), teacher_arch="resnet8", teacher_width=4)
        return Context(config, tmp_path / "run", state.current(), digits, Journal(tmp_path / "run"))

    return make


def test_logits_in_a_dict_are_taken_and_saved_by_their_own_names(context, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_teachers.py").write_text(FACTORIES)
    run = context("my_teachers:Wrapped")
    result = teacher.run(run)
    saved = files.load_tensors(run.folder.teacher)
    assert sorted(saved) == [f"{a}.{b}" for a in ("first", "head", "second") for b in ("bias", "weight")]
    loaded = teacher.load(run)
    x = data.to_float(run.data.val.images)
    correct = (loaded(x).argmax(1) == run.data.val.labels).double().mean()
    assert result["val_accuracy"] == pytest.approx(float(correct))
    with pytest.raises(UserError, match="run: teacher must have a state dict of tensors alone, got _extra_state"):
        teacher.build(context("my_teachers:Extra"))


def test_weights_that_are_damaged_or_no_numbers(context, tmp_path):
    model = classifier("resnet8", num_classes=10, in_channels=1, width=4, image_size=8)
    path = tmp_path / "mine.pt"
    torch.save({"model": model.state_dict()}, path)
    run = context(path)
    teacher.run(run)
    weights = run.folder.teacher.read_bytes()
    run.folder.teacher.write_bytes(weights[:-7])
    with pytest.raises(UserError, match=r"run: teacher must be a readable .* got .*teacher.safetensors \(Error while"):
        teacher.load(run)
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match=r"run: teacher must hold finite weights, got NaN or inf in \S+ of .*mine.pt"):
        teacher.build(run)


def test_a_teacher_at_chance_is_told(context, tmp_path):
    model = classifier("resnet8", num_classes=10, in_channels=1, width=4, image_size=8)
    for values in model.head.parameters():  # names class 0 for every image
        torch.nn.init.zeros_(values)
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    run = context(tmp_path / "mine.pt")
    (note,) = teacher.run(run)["notes"]
    assert f"the Teacher is right about {(run.data.val.labels == 0).float().mean():.3f}" in note


class FewOnly(torch.nn.Module):
    """Right for the images that it is asked about at the start, and for no fewer."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        z = self.head(x.flatten(1))
        return z if len(x) == teacher.ASKED else (z, z)


def test_a_teacher_that_fails_while_a_student_is_distilled(context):
    run = context("")
    images = torch.zeros(16, 8, 8, 1, dtype=torch.uint8)
    for confidence in (0.0, 0.5):
        with pytest.raises(UserError, match=r"run: teacher must return \[N, C\] logits .* got a tuple of 2"):
            gkd.distil(
                run,
                FewOnly(),
                run.seeded("resnet8", 4, "student"),
                lambda _: (torch.arange(16), torch.zeros(16, dtype=torch.int64), images),
                Schedule((1,), 16, 1),
                confidence=confidence,
                seed=0,
            )
