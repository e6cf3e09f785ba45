"""A private training that is stopped and continued spends once, and nothing in it comes from the run's seed."""

import dataclasses
import math

import pytest
import torch
from toy_runs import new_context

from kr_fast.privacy import Gaussian, Ledger, PoissonBatches, PrivateTraining, accounting
from kr_fast.recycling.dp import ledger, spending, teacher, training
from kr_fast.recycling.dp.training import fresh, seed_options
from kr_fast.recycling.presets import preset
from kr_fast.runtime.errors import UserError
from kr_fast.training import EMA

SIZES = {"teacher_batch_size": 10, "generator_batch_size": 10, "generator_steps": 4, "dp_multiplicity": 2}
SIZES |= {"teacher_epochs": 2, "generator_widths": (8,), "dp_physical_batch": 8}


def begun(folder, **options):
    """A run whose noise is decided and booked."""
    values = {**preset("toy,guaranteed"), **SIZES, "out": str(folder / "run"), **options}
    context = new_context(folder, **values)
    context.folder.make().state.mkdir()
    context.journal.finish("privacy", 0.0, ledger.run(context), [])
    return context


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Four steps at a rate of a half in each training."""
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: 3.0)
    monkeypatch.setattr(accounting, "GRID", 0.01)
    return begun(tmp_path)


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


@pytest.mark.parametrize(("noise", "peak"), [(0.5, 0.3), (3.0, 0.1)])
def test_noise_above_one_divides_the_rate(tmp_path, monkeypatch, noise, peak):
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: noise)
    context, rates = begun(tmp_path, teacher_learning_rate=0.3), []
    monkeypatch.setattr(teacher, "rate_factor", lambda step, steps: 1.0)
    monkeypatch.setattr(training, "train", lambda *a, rate, **k: rates.append(rate(0)) or {"curves": {}})
    teacher.train(context)
    assert rates == pytest.approx([peak])


def test_a_seed_marks_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "calibrate", lambda *a, **k: 3.0)
    weights = []
    for name in ("first", "second"):
        context = begun(tmp_path / name, out=str(tmp_path / "run"), dp_seed=3, not_private=True)
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


@pytest.mark.parametrize(("noise", "right"), [(3.0, True), (30.0, False)])
def test_a_ledger_of_other_noise_is_no_ledger_of_the_run(run, noise, right):
    """That of another plan for the same target, say, by which this run would be told to be more private."""
    run.journal.finish("teacher", 0.0, {}, [])
    run.folder.privacy_ledger.unlink()
    book = Ledger.open(run.folder.privacy_ledger, epsilon=8, delta=1e-5, records=20)
    book.book("class counts", ledger.counts(run))
    book.book("teacher", Gaussian(noise, 0.5, 4))
    if right:
        assert ledger.opened(reopened(run)).spent["teacher"].steps == 4
    else:
        with pytest.raises(UserError, match="what was spent on teacher, got another one in"):
            ledger.opened(reopened(run))


def test_another_epsilon_is_refused(run):
    run.config = dataclasses.replace(run.config, epsilon=9.0)
    with pytest.raises(UserError, match="epsilon must be 8, with which"):
        ledger.opened(reopened(run))


def trained(run, losses, rate=0.1):
    """A small network, and what a training of it by ``losses`` of its answers returned."""
    network = torch.nn.Linear(2, 1)
    spent, book = spending.of(run, "teacher"), ledger.opened(reopened(run))
    parts = network, torch.optim.SGD(network.parameters(), lr=0.1)
    done = training.train(
        run.config,
        "teacher",
        *parts,
        lambda indices, random: losses(network(torch.ones(len(indices), 2))[:, 0], indices),
        spent,
        book,
        records=20,
        state_path=run.folder.state / "teacher.pt",
        rate=lambda step: rate,
        ema=EMA(list(network.parameters()), 0.9),
    )
    return network, done


def test_no_record_decides_whether_a_training_ends(run, caplog):
    """Or the release itself would tell that the record was not there: with it, no run would come to its end."""
    network, done = trained(run, lambda answers, indices: answers * torch.where(indices == 7, torch.inf, 1.0))
    assert torch.isfinite(network.weight).all()
    assert all(map(math.isfinite, done["curves"]["loss"]))
    assert "gradients in the training of the private teacher were not finite, and left out" in caplog.text


def test_weights_that_are_not_finite_are_not_drawn_anew(run):
    for _ in range(2):
        with pytest.raises(UserError, match="weights of the private teacher must be finite .* got others after step 1"):
            trained(run, lambda answers, indices: answers, rate=torch.inf)
    assert ledger.opened(reopened(run)).spent["teacher"].steps == 1


def test_a_training_is_told_to_be_finished_before_its_result_is_seen(run):
    """Or its last steps could be taken again from a copy of the position before, until the result pleases."""
    trained(run, lambda answers, indices: answers)
    book = ledger.opened(reopened(run))
    book.book("teacher", Gaussian(3.0, 0.5, 4), 3)
    assert book.spent["teacher"].steps == 5


def test_steps_without_a_record_have_no_loss(run, monkeypatch):
    monkeypatch.setattr(training, "PoissonBatches", lambda records, rate, *rest: PoissonBatches(records, 1e-18, *rest))
    _, done = trained(run, lambda answers, indices: answers)
    assert done["curves"] == {"step": [], "loss": []}
