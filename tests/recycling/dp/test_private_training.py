"""A private training that is stopped and continued spends once, and nothing in it comes from the run's seed."""

import dataclasses

import pytest
import torch
from toy_runs import new_context

from kr_fast.privacy import Gaussian, Ledger, PrivateTraining, accounting
from kr_fast.recycling.dp import ledger, teacher
from kr_fast.recycling.dp.training import fresh, seed_options
from kr_fast.recycling.presets import preset
from kr_fast.runtime.errors import UserError

SIZES = {"teacher_batch_size": 10, "generator_batch_size": 10, "generator_steps": 4, "dp_multiplicity": 2}
SIZES |= {"teacher_epochs": 2, "generator_widths": (8,), "dp_physical_batch": 8}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose noise is decided and booked: four steps at a rate of a half in each training."""
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: 3.0)
    monkeypatch.setattr(accounting, "GRID", 0.01)
    values = {**preset("toy,guaranteed"), **SIZES, "out": str(tmp_path / "run")}
    context = new_context(tmp_path, **values)
    context.folder.make().state.mkdir()
    context.journal.finish("privacy", 0.0, ledger.run(context), [])
    return context


def reopened(context):
    """The same run in another process."""
    context.privacy = None
    return context


class Stopped(Exception):
    pass


def test_a_stopped_training_goes_on_and_spends_once(run, monkeypatch):
    """Stopped in the middle of a logical batch, of which two physical ones make one."""
    steps, backward = [], PrivateTraining.backward

    def stops(self, *args, **options):
        if self.steps == 2:
            raise Stopped
        return backward(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PrivateTraining, "backward", stops)
        teacher.train(run)
    step = PrivateTraining.step
    monkeypatch.setattr(PrivateTraining, "step", lambda self: (steps.append(self.steps), step(self)))
    network, curves = teacher.train(reopened(run))
    assert steps == [2, 3]  # what was saved is not done again
    assert curves["step"] == [1, 2, 3, 4]
    book = ledger.opened(run)
    assert book.spent["teacher"] == Gaussian(3.0, 0.5, 4)
    before = book.epsilon()
    again, _ = teacher.train(reopened(run))  # as after a kill before its file was written: it is there, and free
    assert steps == [2, 3]
    assert ledger.opened(run).epsilon() == before
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_position_that_is_gone_counts_twice(run, monkeypatch):
    """Or a Teacher could be made again and again, and the best one be taken."""

    def stops(self, *args, **options):
        if self.steps == 2:
            raise Stopped
        return backward(self, *args, **options)

    backward = PrivateTraining.backward
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PrivateTraining, "backward", stops)
        teacher.train(run)
    (run.folder.state / "teacher.pt").unlink()
    teacher.train(reopened(run))
    assert ledger.opened(run).spent["teacher"] == Gaussian(3.0, 0.5, 4 + 2)
    run.journal.forget("privacy")
    ledger.run(reopened(run))  # which draws other class counts
    assert ledger.opened(run).spent["class counts"].steps == 2


def test_two_trainings_of_one_seed_differ_in_samples_and_noise(run):
    weights = []
    for _ in range(2):
        for path in (run.folder.state / "teacher.pt", run.folder.privacy_ledger):
            path.unlink(missing_ok=True)
        run.journal.forget("privacy")
        run.journal.finish("privacy", 0.0, ledger.run(reopened(run)), [])
        weights.append(teacher.train(run)[0].head.weight.detach().clone())
    assert not torch.equal(*weights)
    draws = [fresh(run.config, "rows").initial_seed() for _ in range(2)]
    assert draws[0] != draws[1]
    assert seed_options(run.config, "noise") == {}


def test_a_seed_marks_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: 3.0)
    values = {**preset("toy,guaranteed"), **SIZES, "out": str(tmp_path / "run"), "dp_seed": 3, "not_private": True}
    weights = []
    for name in ("first", "second"):
        context = new_context(tmp_path / name, **values)
        context.folder.make().state.mkdir()
        context.journal.finish("privacy", 0.0, ledger.run(context), [])
        weights.append(teacher.train(context)[0].head.weight)
        assert not ledger.opened(context).is_private
        assert ledger.guarantee(context)["epsilon"] is None
    assert torch.equal(*weights)


def test_a_ledger_that_is_gone_is_not_begun_anew(run):
    run.folder.privacy_ledger.unlink()
    with pytest.raises(UserError, match="epsilon must have the ledger of what was spent on class counts, got no"):
        ledger.opened(reopened(run))
    Ledger.open(run.folder.privacy_ledger, epsilon=8, delta=1e-5, records=20)  # one in which nothing was spent
    with pytest.raises(UserError, match="what was spent on class counts, got another one in"):
        ledger.opened(reopened(run))


def test_another_epsilon_is_refused(run):
    run.config = dataclasses.replace(run.config, epsilon=9.0)
    with pytest.raises(UserError, match="epsilon must be 8, with which"):
        ledger.opened(reopened(run))
