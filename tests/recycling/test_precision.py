"""The precision of a run: what is decided, that it is recorded and followed, and that stages train in it."""

import dataclasses

import pytest
import torch

from kr_fast.data import Dataset, Split
from kr_fast.recycling import precision
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context, Precision
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages import dataset
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.recycling.stages.generation import generator
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage.journal import Journal
from kr_fast.training.precision import FEWEST_STEPS, autocast, gain

BFLOAT16 = Precision("bfloat16", "bfloat16", "asked for")


def context(out, asked="auto"):
    """A run of two classes of 8 x 8 pixels that has not begun."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 8, 8, 1), generator=draw, dtype=torch.uint8)
    split = Split(images, torch.arange(64) % 2)
    config = RecycleConfig(**{**preset("toy"), "out": str(out), "precision": asked, "generator_widths": (8,)})
    return Context(config, out, state.current(), Dataset("made", ("a", "b"), split, split, split), Journal(out))


@pytest.mark.parametrize(
    ("asked", "amx", "gains", "expected"),
    [
        ("bfloat16", False, None, "bfloat16: asked for"),
        ("float32", True, None, "float32: asked for"),
        ("auto", False, None, "float32: the processor has no AMX"),
        (
            "auto",
            True,
            (1.9, 1.14),
            "classifiers bfloat16, generator float32: "
            "measured, bfloat16 is 1.90 times as fast for classifiers and 1.14 for the generator",
        ),
        (
            "auto",
            True,
            (1.15, 2.0),
            "bfloat16: measured, bfloat16 is 1.15 times as fast for classifiers and 2.00 for the generator",
        ),
    ],
)
def test_decision(asked, amx, gains, expected, tmp_path, monkeypatch):
    measured = iter(gains or ())  # nothing is timed where the rest decides
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    monkeypatch.setattr(precision, "gain", lambda *_: next(measured))
    assert str(precision.of_run(context(tmp_path, asked))) == expected


@pytest.mark.parametrize("step", [precision.classifier_step, precision.generator_step])
def test_steps_are_timed_in_both(step, monkeypatch):
    seen = []
    monkeypatch.setattr(precision, "autocast", lambda device, name: seen.append(name) or autocast(device, name))
    config = RecycleConfig(**{**preset("toy"), "generator_widths": (8,)})
    assert gain(step(config, (8, 8, 1), 2), seconds=0.0) > 0
    assert seen == ["float32", "bfloat16"] * (1 + FEWEST_STEPS)  # the first for the library's kernels


def test_the_recorded_precision_is_followed(tmp_path, monkeypatch):
    run = context(tmp_path, "bfloat16")
    run.precision = precision.of_run(run)
    run.journal.finish("data", 1.0, dataset.run(run))
    monkeypatch.setattr(precision, "has_amx", lambda: pytest.fail("measured again"))
    assert precision.of_run(context(tmp_path)) == run.precision == BFLOAT16


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match="^run: precision must be one of auto, float32, bfloat16, got float16$"):
        RecycleConfig(precision="float16")


def test_generator_and_student_train_in_it(tmp_path):
    """In bfloat16 losses are near those of float32, and the same in a second run."""

    def losses(name, chosen):
        run = dataclasses.replace(context(tmp_path / name), precision=chosen)
        folder, split = tmp_path / name / "generator", run.data.train
        done = generator.train(run, split, [2], lambda _: folder, seed=0, state_path=tmp_path / "state.pt")
        torch.manual_seed(0)
        teacher_model, student = (run.network("resnet8", 4) for _ in range(2))
        drawn, options = (torch.arange(64), split.labels, split.images), {"confidence": 0.0, "seed": 0}
        distilled = gkd.distil(run, teacher_model.eval(), student, lambda _: drawn, Schedule((1,), 64, 1), **options)
        return [done["curves"]["loss"][-1], *distilled.loss]

    exact, rounded = losses("float32", Precision()), losses("bfloat16", BFLOAT16)
    assert losses("again", BFLOAT16) == rounded
    for a, b in zip(exact, rounded, strict=True):
        assert a != b
        assert a == pytest.approx(b, rel=0.05)
