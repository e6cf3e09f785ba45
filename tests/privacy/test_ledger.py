"""The ledger: recomputed from scratch, spent once over interruptions, refused where it cannot be right."""

import json
import math

import pytest

from kr_fast.privacy import Gaussian, Laplace, Ledger, PureDP, epsilon_of
from kr_fast.runtime.errors import UserError

TARGET = {"epsilon": 8.0, "delta": 1e-5, "records": 4708}
TRAINING = Gaussian(6.0, 0.2, 100)  # epsilon 1.3: few steps and large noise, so that a test takes a second


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.json"


def opened(path, **values):
    """What a new process of the same run has."""
    return Ledger.open(path, **{**TARGET, **values})


def test_reviewer_recomputes_it_with_the_accounting_library_alone(path):
    ledger = opened(path)
    ledger.book("class counts", Laplace(20.0))
    ledger.book("teacher", TRAINING, 0, 60)
    ledger.book("teacher", TRAINING, 60, 100)
    ledger.book("epoch", PureDP(0.1))
    spent = json.loads(path.read_text())["spent"]

    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as pld

    make = {
        "gaussian": lambda each: pld.from_gaussian_mechanism(
            each["noise_multiplier"], sampling_prob=each["sample_rate"]
        ),
        "laplace": lambda each: pld.from_laplace_mechanism(each["noise_multiplier"]),
        "pure": lambda each: pld.from_privacy_parameters(common.DifferentialPrivacyParameters(each["epsilon"], 0)),
    }
    total = pld.identity()
    for each in spent:
        total = total.compose(make[each["mechanism"]](each).self_compose(each["steps"]))
    assert total.get_epsilon_for_delta(1e-5) == Ledger.read(path).epsilon() == ledger.epsilon()
    assert Ledger.read(path).epsilon(1e-3) == pytest.approx(total.get_epsilon_for_delta(1e-3), rel=1e-12)


def test_sampled_trainings_are_those_of_the_library_s_accountant(path):
    import dp_accounting as dp

    ledger = opened(path)
    ledger.book("teacher", TRAINING, 0, 60)
    ledger.book("generator", Gaussian(8.0, 0.1, 200))
    accountant = dp.pld.PLDAccountant()
    for each in json.loads(path.read_text())["spent"]:
        step = dp.PoissonSampledDpEvent(each["sample_rate"], dp.GaussianDpEvent(each["noise_multiplier"]))
        accountant.compose(step, each["steps"])
    assert ledger.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_file_says_what_the_guarantee_rests_on(path):
    opened(path).book("teacher", TRAINING, 0, 50)
    content = json.loads(path.read_text())
    assert content["target"] == TARGET
    assert content["neighbouring"] == "add or remove one record"
    assert content["sampling"].startswith("Poisson")
    assert set(content["versions"]) == {"kr_fast", "python", "dp-accounting"}
    assert content["spent"][0] == {
        "for": "teacher", "mechanism": "gaussian", "noise_multiplier": 6.0, "sample_rate": 0.2, "steps": 50,
        "again": 0, "lost": 0,
    }  # fmt: skip
    assert sum('"steps": [0, 50]' in line for line in path.read_text().splitlines()) == 1  # an event is a line


def train(path, state, crash=None, every=20):
    """A training that saves its state every 20 steps and may crash after booking, or after steps before they are saved.

    ``state``: the saved step, as the file of a run would hold it.
    """
    ledger = opened(path)
    while state["step"] < TRAINING.steps:
        start, stop = state["step"], state["step"] + every
        ledger.book("teacher", TRAINING, start, stop)
        if crash == start:
            return
        state["step"] = stop
    ledger.finish("teacher")


@pytest.mark.parametrize("crashes", [(), (0,), (40,), (80,), (0, 40, 40, 80)])
def test_interrupted_training_spends_what_it_spent_once(path, crashes):
    state = {"step": 0}
    for crash in crashes:
        train(path, state, crash)
        assert Ledger.read(path).spent["teacher"].steps == crash + 20  # counted though they may not have been taken
    train(path, state)
    train(path, state)  # a finished run that is started again
    ledger = Ledger.read(path)
    assert ledger.spent == {"teacher": TRAINING}
    assert ledger.epsilon() == epsilon_of([TRAINING], 1e-5)
    assert json.loads(path.read_text())["spent"][0]["lost"] == 20 * len(crashes)


def test_going_back_behind_a_saved_state_counts_twice(path):
    train(path, {"step": 0}, crash=60)
    ledger = opened(path)
    ledger.book("teacher", TRAINING, 20, 40)  # the states after 40 and 60 steps were set aside
    ledger.book("teacher", TRAINING, 40, 100)
    assert Ledger.read(path).spent["teacher"].steps == 100 + 40
    finished = opened(path)
    finished.finish("teacher")
    finished.book("teacher", TRAINING, 0, 100)
    assert finished.spent["teacher"].steps == 100 + 40 + 100


def test_going_back_is_refused_where_the_target_does_not_cover_it(path):
    target = epsilon_of([TRAINING], 1e-5) + 1e-3
    ledger = opened(path, epsilon=target)
    ledger.book("teacher", TRAINING, 0, 12)
    ledger.book("teacher", TRAINING, 12, 100)
    kept = path.read_text()
    with pytest.raises(UserError, match="12 steps of teacher are taken twice: put its last saved state back"):
        opened(path, epsilon=target).book("teacher", TRAINING, 0, 12)
    assert path.read_text() == kept


def test_one_process_cannot_book_twice_and_spend_once(path):
    """Nothing was lost: the first counts are alive in the process that asks for them again."""
    ledger = opened(path)
    ledger.book("class counts", Laplace(20.0))
    ledger.book("class counts", Laplace(20.0))
    assert ledger.spent["class counts"].steps == 2
    again = opened(path)
    again.book("class counts", Laplace(20.0))  # the process was killed before it wrote the counts
    assert again.spent["class counts"].steps == 2
    again.finish("class counts")
    assert opened(path).spent["class counts"].steps == 2


def test_events_are_only_added(path):
    ledger, seen = opened(path), []
    for purpose, mechanism in (("class counts", Laplace(20.0)), ("teacher", TRAINING), ("epoch", PureDP(0.1))):
        ledger.book(purpose, mechanism)
        events = json.loads(path.read_text())["events"]
        assert events[: len(seen)] == seen
        assert len(events) == len(seen) + 1
        seen = events


def test_a_plan_beyond_the_target_is_refused_before_its_first_step(path):
    ledger = opened(path, epsilon=1.5)
    ledger.book("teacher", TRAINING, 0, 1)
    kept = path.read_text()
    with pytest.raises(UserError, match=r"cover the steps planned for teacher, generator, which spend 1\.9"):
        ledger.book("generator", TRAINING, 0, 1)
    assert path.read_text() == kept
    assert list(ledger.spent) == ["teacher"]


@pytest.mark.parametrize(("name", "value"), [("epsilon", 4.0), ("delta", 1e-6), ("records", 5000)])
def test_another_target_on_resume_is_refused(path, name, value):
    opened(path)
    before = rf"Ledger: {name} must be {TARGET[name]:g}, with which .*ledger.json was begun .*got {value:g}"
    with pytest.raises(UserError, match=before):
        opened(path, **{name: value})


def test_another_noise_on_resume_is_refused(path):
    opened(path).book("teacher", TRAINING, 0, 20)
    with pytest.raises(UserError, match="mechanism of teacher must be Gaussian.*of which steps are booked"):
        opened(path).book("teacher", Gaussian(5.0, 0.2, 100), 20, 40)


def test_a_ledger_that_was_removed_or_put_back_is_noticed(path):
    opened(path).book("teacher", TRAINING, 0, 20)
    old = path.read_text()
    ledger = opened(path)
    ledger.book("teacher", TRAINING, 20, 40)
    path.write_text(old)
    with pytest.raises(UserError, match="must be as this run left it, got another file"):
        ledger.book("teacher", TRAINING, 40, 60)
    with pytest.raises(UserError, match="start must be at most 20, the steps of teacher that are booked"):
        opened(path).book("teacher", TRAINING, 40, 60)
    path.unlink()
    with pytest.raises(UserError, match="got another file"):
        ledger.book("teacher", TRAINING, 40, 60)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"steps": 40', '"steps": 20'),  # in the sums
        ('"steps": [20, 40]', '"steps": [30, 40]'),  # in the events: a gap
        (
            '"noise_multiplier": 6.0, "sample_rate": 0.2, "steps": [20, 40]',
            '"noise_multiplier": 9.0, "steps": [20, 40]',
        ),
        ("ledger 1", "ledger 2"),
        ('"epsilon": 8.0,', '"epsilon": null,'),
        ('"mechanism": "gaussian"', '"mechanism": "none"'),
    ],
)
def test_a_changed_file_is_refused(path, old, new):
    ledger = opened(path)
    ledger.book("teacher", TRAINING, 0, 20)
    ledger.book("teacher", TRAINING, 20, 40)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"ledger.json must hold a privacy ledger of this version, as it was written"):
        Ledger.read(path)


def test_what_is_read_is_not_booked_in(path):
    opened(path)
    with pytest.raises(UserError, match=r"must be opened by Ledger.open to book in it"):
        Ledger.read(path).book("teacher", TRAINING)
    with pytest.raises(FileNotFoundError):
        Ledger.read(path.with_name("none.json"))


def test_bookings_are_checked(path):
    ledger = opened(path)
    for arguments, text in (
        (("", TRAINING), "purpose must be a text"),
        (("teacher", 1.0), "mechanism must be a Gaussian, Laplace or PureDP"),
        (("teacher", TRAINING, 0, 101), "stop must be an integer, at least 0 and at most 100"),
        (("teacher", TRAINING, 20, 10), "start must be an integer, at least 0 and at most 10"),
    ):
        with pytest.raises(UserError, match=f"Ledger.book: {text}"):
            ledger.book(*arguments)
    with pytest.raises(UserError, match=r"Ledger.finish: purpose must be one of those booked, got teacher"):
        ledger.finish("teacher")
    assert ledger.booked("teacher") == 0
    with pytest.raises(UserError, match="got data of unknown size"):
        opened(path.with_name("other.json"), records=None)
    assert not path.with_name("other.json").exists()


def test_a_seed_makes_it_not_private_for_good(path):
    opened(path, not_private="a seed was given").book("teacher", TRAINING)
    ledger = opened(path)
    assert not ledger.is_private
    assert ledger.epsilon() == math.inf
    summary = Ledger.read(path).summary()
    assert (summary["epsilon"], summary["private"], summary["not_private"]) == (None, False, "a seed was given")


def test_summary_holds_plain_values(path):
    ledger = opened(path)
    ledger.book("teacher", TRAINING)
    ledger.book("class counts", Laplace(20.0))
    summary = json.loads(json.dumps(ledger.summary(), allow_nan=False))
    alone = {each["for"]: each["epsilon_alone"] for each in summary["spent"]}
    assert alone["class counts"] == pytest.approx(0.05, abs=1e-3)
    assert alone["teacher"] < summary["epsilon"] < sum(alone.values())
    assert {name: summary[name] for name in ("delta", "target_epsilon", "records", "private")} == {
        "delta": 1e-5, "target_epsilon": 8.0, "records": 4708, "private": True,
    }  # fmt: skip
