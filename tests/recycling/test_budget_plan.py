"""The division of a run's time: arithmetic on made-up costs, and a made-up machine that a whole plan is run on."""

import dataclasses
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.recycling.budget import planner
from kr_fast.recycling.budget.ledger import Ledger
from kr_fast.recycling.budget.planner import Costs, Plan, Sizes
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.text import seconds

COSTS = Costs(step=0.2, image=0.002, trained=0.0002, trial=0.3, period=0.1)
SIZES = Sizes(pass_steps=100, trial_images=512, images=1024, batch=64, tuned=4, validation=600)
positive = st.floats(1e-6, 10)
costs = st.builds(Costs, positive, positive, positive, positive, positive, *[st.floats(1, 20)] * 3)
counts = st.integers(1, 5000)
sizes = st.builds(Sizes, counts, counts, counts, st.integers(1, 128), st.integers(0, 8), counts)


@settings(max_examples=100, deadline=None)
@given(costs, sizes, st.floats(1, 1000))
def test_plan_fills_the_time_and_gives_each_stage_its_least(c, s, times):
    """From the least budget to a thousand of it: nothing is above the time, and less than one period is left over."""
    least = planner.least(c, s)
    given_seconds = times * planner.total(c, s, least) * (1 + 1e-9)
    plan = planner.divide(c, s, given_seconds)
    assert planner.total(c, s, plan) <= given_seconds * (1 + 1e-9)
    assert plan.rounds[-1] >= s.pass_steps
    assert plan.trial_images >= s.trial_images
    assert min(plan.cycles) >= 1
    if plan != least:
        assert given_seconds - planner.total(c, s, plan) < planner.period_seconds(c, s, plan.passes) * (1 + 1e-6)


def test_twins_take_their_part_of_what_students_cost():
    """Six Students besides the run's own, two of them twins: the same plan and total, a third for their stage."""
    plain, twins = (dataclasses.replace(COSTS, students=7.0, twins=count) for count in (0.0, 2.0))
    plan = planner.divide(plain, SIZES, 500)
    assert planner.divide(twins, SIZES, 500) == plan
    before, now = planner.stages(plain, SIZES, plan), planner.stages(twins, SIZES, plan)
    assert "canary_students" not in before
    assert now["canary_students"] == pytest.approx(before["shadow_students"] / 3)
    assert now["canary_students"] + now["shadow_students"] == pytest.approx(before["shadow_students"])
    assert planner.total(twins, SIZES, plan) == pytest.approx(planner.total(plain, SIZES, plan))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**5), st.integers(1, 10**5), st.integers(1, 3000))
def test_rounds_grow_up_to_the_last_step(done, last, pass_steps):
    ends = planner.rounds(done, last, pass_steps)
    assert bool(ends) == (last >= planner.WORTHWHILE * done)
    if not ends:
        return
    assert ends[-1] == last
    assert len(ends) <= planner.ROUNDS
    assert done or ends[0] >= min(pass_steps, last)
    steps = (done, *ends) if done else ends
    for before, after in itertools.pairwise(steps):
        assert after > before or last == done
        if last < done * planner.GROWTH**planner.ROUNDS or not done:
            assert after <= before * planner.GROWTH**1.5 + 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**4), st.integers(1, 500))
def test_cycles_double_and_are_what_next_cycle_gives_one_after_the_other(count, steps):
    """The plan of the start is carried out to the letter where everything costs what was planned."""
    lengths = planner.cycles(count, steps)
    assert sum(lengths) == count
    assert len(lengths) == 1 or lengths[0] * steps >= planner.CYCLE_STEPS
    assert all(after == 2 * before for before, after in itertools.pairwise(lengths[:-1]))
    done = []
    while following := planner.next_cycle(done, count - sum(done), steps):
        done.append(following)
    assert tuple(done) == lengths


def test_next_cycle_takes_a_rest_that_is_too_short_for_two():
    assert planner.next_cycle([4], 24, 100) == 8  # 8, then 16
    assert planner.next_cycle([4], 23, 100) == 23
    assert planner.next_cycle([4], 2, 100) == 2
    assert planner.next_cycle([4], 1, 100) == 0
    assert planner.next_cycle([], -5, 100) == 1  # the time is over, but a Student is needed


def test_passes_balance_drawing_and_training():
    assert planner.passes(COSTS) == 10
    assert planner.passes(dataclasses.replace(COSTS, trained=0.0004)) == 5
    assert planner.passes(dataclasses.replace(COSTS, trained=1.0)) == 3
    assert planner.passes(dataclasses.replace(COSTS, image=1.0)) == 10


@pytest.mark.parametrize(
    ("losses", "accuracies", "expected"),
    [
        ([0.3, 0.2], [0.5, 0.4], True),  # too few rounds to tell
        ([0.3, 0.2, 0.19, 0.189], [0.9] * 4, True),  # the loss still falls by 5 %
        ([0.3, 0.2, 0.1999, 0.1998], [0.9] * 4, False),  # by 0.1 %
        ([0.3, 0.2, 0.21, 0.22], [0.90, 0.90, 0.90, 0.91], False),  # standard error of 0.9 in 600: 0.0122
        ([0.3, 0.2, 0.21, 0.22], [0.90, 0.90, 0.92, 0.91], True),
        ([0.3, 0.2, 0.21, 0.22], [1.0] * 4, False),
    ],
)
def test_generator_improves_while_loss_or_accuracy_does_beyond_noise(losses, accuracies, expected):
    assert planner.improving(losses, accuracies, 600) is expected


def test_round_of_the_lowest_loss_within_a_standard_error_of_the_best_is_chosen():
    assert planner.best_round([0.4, 0.3, 0.2, 0.1], [0.5, 0.91, 0.90, 0.85], 600) == 2
    assert planner.best_round([0.2, 0.1, 0.15], [0.90, 0.90, 0.91], 600) == 1
    assert planner.best_round([0.2, 0.1], [1.0, 0.999], 600) == 0


def test_student_improves_until_two_cycles_bring_nothing():
    assert planner.student_improves([0.9, 0.8])
    assert planner.student_improves([0.9, 0.8, 0.91])
    assert not planner.student_improves([0.9, 0.9, 0.8])


def test_costs_follow_what_work_took():
    slower, pace = planner.revised(COSTS, "student", 100.0, 140.0, 1000.0, False)
    assert (pace, slower.step) == (1.0, COSTS.step)
    assert (slower.image, slower.trained, slower.trial, slower.period) == pytest.approx((0.0028, 0.00028, 0.42, 0.14))
    # Twice as long as such work took before: the machine is slower, and all work is.
    slower, pace = planner.revised(COSTS, "generator", 100.0, 200.0, 1000.0, False)
    assert (pace, slower.step, slower.image) == pytest.approx((2.0, 0.4, 0.004))
    # The first time it says only that the short measurement was wrong.
    slower, pace = planner.revised(COSTS, "generator", 100.0, 200.0, 1000.0, True)
    assert (pace, slower.step, slower.image) == pytest.approx((1.0, 0.4, 0.002))
    # Half a second in a quarter of an hour says nothing.
    slower, pace = planner.revised(COSTS, "generator", 0.1, 0.6, 1000.0, False)
    assert (pace, slower.step, slower.image) == pytest.approx((1.0, 0.3, 0.002))


class Machine:
    """A clock that runs as work is done: ``slowness`` times what the costs say."""

    def __init__(self, monkeypatch, slowness):
        self.now, self.slowness = 0.0, slowness
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, cost):
        self.now += cost * self.slowness(self.now)


def run_on(machine, ledger, losses=lambda step: 1 / step, accuracies=lambda periods: 1 - 1 / (2 + periods)):
    """All stages that ``ledger`` divides the time among, on ``machine``, as the stages of a run call it."""
    c, s = dataclasses.replace(COSTS, students=ledger.costs.students, drawings=ledger.costs.drawings), ledger.sizes
    trial = planner.trial_seconds(c, Plan((), ledger.trial_images, ledger.passes, ()))
    done = ledger.rounds[-1]["end"] if ledger.rounds else 0
    while end := ledger.next_round():
        machine.work((end - done) * c.step)
        seconds = ledger.spend("generator")
        machine.work(trial)
        ledger.finish_round(seconds, ledger.spend("generator"), losses(end), 0.5)
        done = end
    machine.work(s.tuned * trial)
    ledger.finish("tuning")
    ledger.begin_student({"checkpoint": done}, ledger.path.with_name("student.pt"), 1.0)
    while cycles := ledger.next_cycle():
        machine.work(cycles[-1] * planner.period_seconds(c, s, ledger.student["passes"], own=True))
        ledger.finish_cycle(ledger.spend("gkd"), accuracies(sum(cycles)))
    whole, own = (planner.period_seconds(c, s, ledger.student["passes"], own=own) for own in (False, True))
    machine.work(sum(cycle["periods"] for cycle in ledger.cycles) * (whole - own))
    ledger.finish("shadow_students")
    for stage in ("audit", "report"):
        machine.work(ledger.planned.get(stage, 0.0))
        ledger.finish(stage)


def ledger_of(path, budget, costs=COSTS, fixed=None):
    fixed = fixed or {"audit": 20.0, "report": 5.0}
    plan = planner.divide(costs, SIZES, budget - sum(fixed.values()))
    planned = {**fixed, **planner.stages(costs, SIZES, plan)}
    return plan, Ledger(
        path / "budget.json", budget, costs, SIZES, planned, dict(fixed), plan.trial_images, plan.passes
    )


@pytest.mark.parametrize("shadows", [1.0, 5.0])
def test_run_on_a_steady_machine_is_the_plan(tmp_path, monkeypatch, shadows):
    machine = Machine(monkeypatch, lambda now: 1.0)
    plan, ledger = ledger_of(tmp_path, 1800, dataclasses.replace(COSTS, students=shadows, drawings=2.0))
    run_on(machine, ledger)
    assert tuple(each["end"] for each in ledger.rounds) == pytest.approx(plan.rounds, rel=0.01)
    assert sum(each["periods"] for each in ledger.cycles) == pytest.approx(sum(plan.cycles), abs=2)
    assert 0.97 * 1800 < machine.now <= 1800
    assert ledger.notes == []


def test_machine_that_slows_down_has_its_plan_revised_and_told(tmp_path, monkeypatch, caplog):
    """Half as fast from the first sixth on: fewer steps, the time is kept, and a sentence says so."""
    machine = Machine(monkeypatch, lambda now: 1.0 if now < 300 else 2.0)
    plan, ledger = ledger_of(tmp_path, 1800)
    run_on(machine, ledger)
    assert ledger.rounds[-1]["end"] < 0.9 * plan.rounds[-1]
    assert sum(each["periods"] for each in ledger.cycles) < 0.7 * sum(plan.cycles)
    assert machine.now < 1.03 * 1800
    assert len(ledger.notes) == 1
    assert "was divided anew" in ledger.notes[0]
    assert f"run: {ledger.notes[0]}" in caplog.text


def test_what_brings_nothing_ends_before_its_time(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, lambda now: 1.0)
    plan, ledger = ledger_of(tmp_path, 1800)
    run_on(machine, ledger, losses=lambda step: 0.1, accuracies=lambda periods: 0.9)
    assert len(ledger.rounds) == 3
    assert len(ledger.cycles) == 3
    assert ledger.rounds[-1]["end"] < plan.rounds[-1]
    summary = ledger.summary(teacher_accuracy=0.95)
    assert summary["still_improving"] == []


def test_summary_names_what_was_still_improving(tmp_path, monkeypatch):
    _, ledger = ledger_of(tmp_path, 1800)
    run_on(Machine(monkeypatch, lambda now: 1.0), ledger)
    assert ledger.summary(teacher_accuracy=1.0)["still_improving"] == ["generator", "gkd"]
    assert ledger.summary(teacher_accuracy=0.5)["still_improving"] == ["generator"]  # the Student is beyond its Teacher


@pytest.mark.parametrize(("larger", "generator"), [(1800.0, True), (1100.0, False)])
def test_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path, monkeypatch, larger, generator):
    """Twice the time: a better generator and a Student that learns from it. A little more: the same Student, longer."""
    machine = Machine(monkeypatch, lambda now: 1.0)
    _, ledger = ledger_of(tmp_path, 900)
    run_on(machine, ledger)
    rounds, cycles = [dict(each) for each in ledger.rounds], [dict(each) for each in ledger.cycles]
    ledger = Ledger.read(ledger.path)
    ledger.reopen(["generator", "gkd", "audit", "report"], larger)
    run_on(machine, ledger)
    assert 0.95 * larger < machine.now <= larger
    assert ledger.rounds[: len(rounds)] == rounds
    if generator:
        assert ledger.rounds[-1]["end"] > 1.7 * rounds[-1]["end"]
        assert sum(each["periods"] for each in ledger.cycles) > 0.9 * sum(each["periods"] for each in cycles)
    else:
        assert len(ledger.rounds) == len(rounds)
        assert ledger.cycles[: len(cycles)] == cycles
        assert len(ledger.cycles) > len(cycles)


def test_pending_work_is_read_back_as_it_was_written(tmp_path):
    """What a killed run finds is the step that its predecessor was on the way to, whatever the time is now."""
    _, ledger = ledger_of(tmp_path, 1800)
    end = ledger.next_round()
    again = Ledger.read(ledger.path)
    again.spent["teacher"] = 1000.0
    assert again.next_round() == end
    assert dataclasses.asdict(Ledger.read(ledger.path)) == dataclasses.asdict(ledger)
    again.finish_round(0.1, 0.1, 1.0, 0.5)  # since the restart, not since the round began
    assert again.rounds[-1]["seconds"] == pytest.approx(end * COSTS.step)


def test_damaged_record_is_named(tmp_path):
    (tmp_path / "budget.json").write_text('{"budget": 3}')
    with pytest.raises(UserError, match="budget.json must hold the budget of a run of this version of kr-fast"):
        Ledger.read(tmp_path / "budget.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h0m5s", 3605), ("0m", 0)]
    + [(text, None) for text in ("", "30", "m", "30 m", "-3m", "1.5h", "30m1h", "3d", "\u0663m", "30m\n")],
)
def test_times_as_people_write_them(text, expected):
    assert seconds(text) == expected
