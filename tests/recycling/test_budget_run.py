"""Runs of the toy preset with a budget, on a clock that runs with the work done and so does not hang on the machine."""

import dataclasses
import json
import shutil
import time

import pytest
import torch

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import dry_run, recycle
from kr_fast.recycling.presets import preset
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis import Sampler
from kr_fast.training import SGD, AdamW

pytestmark = pytest.mark.pipeline
SECONDS = {AdamW: 0.1, SGD: 0.01, Sampler: 0.2}  # of a step of the generator, of a classifier, of drawing a period
SMALL = {**preset("toy"), "num_shadows": 0, "tune_noise_scale": (), "tune_confidence": (), "images": 64}


class Stopped(BaseException):
    """In place of a kill."""


@pytest.fixture
def clock(monkeypatch):
    """``perf_counter`` that shows the work done so far, times ``clock["slowness"]``.

    On one thread, for it does not see what worker processes do.
    """
    state, threads = {"now": 0.0, "slowness": 1}, torch.get_num_threads()
    torch.set_num_threads(1)

    def reading():
        state["now"] += 1e-4
        return state["now"]

    def counted(kind, name):
        whole = getattr(kind, name)

        def method(self, *args, **options):
            state["now"] += SECONDS[kind] * state["slowness"]
            return whole(self, *args, **options)

        monkeypatch.setattr(kind, name, method)

    monkeypatch.setattr(time, "perf_counter", reading)
    for kind in (AdamW, SGD):
        counted(kind, "step")
    counted(Sampler, "__call__")
    yield state
    torch.set_num_threads(threads)


def config(out, budget, **options):
    return RecycleConfig(**{**SMALL, **options, "out": str(out), "budget": budget})


def ledger(out):
    return json.loads((out / "private" / "state" / "budget.json").read_text())


def stop_after(monkeypatch, write, when):
    """Let the run stop once ``files.write`` has written something of which ``when(path, value)`` is true."""
    with monkeypatch.context() as patch:
        whole = getattr(files, write)

        def write_and_stop(path, value, *rest):
            whole(path, value, *rest)
            if when(path, value):
                raise Stopped

        patch.setattr(files, write, write_and_stop)
        yield


def run_until(monkeypatch, made, write, when):
    for _ in stop_after(monkeypatch, write, when):
        with pytest.raises(Stopped):
            recycle(made)


def noted(what, key):
    """True once the ledger has ``key`` in the last entry of ``what``: rounds or cycles."""
    return lambda path, value: path.name == "budget.json" and value[what] and key in value[what][-1]


def test_killed_run_continues_to_the_same_weights(tmp_path, monkeypatch, clock):
    """Within a round of the generator and within a cycle of the Student; the step it goes on to is not planned anew."""
    made = config(tmp_path / "run", "12s")
    steps = [("rounds", "end", "val_loss", "generator.pt"), ("cycles", "periods", "val_accuracy", "student.pt")]
    monkeypatch.setattr("kr_fast.recycling.stages.generation.generator.SAVE_EVERY", 5)
    for what, begun, over, state in steps:
        run_until(monkeypatch, made, "write_json", noted(what, begun))
        expected = ledger(tmp_path / "run")[what]
        whole = dataclasses.replace(made, out=str(tmp_path / what))
        shutil.copytree(made.out, whole.out)
        run_until(monkeypatch, whole, "write_json", noted(what, over))
        run_until(monkeypatch, made, "save_state", lambda path, _, state=state: path.name == state)
        run_until(monkeypatch, made, "write_json", noted(what, over))
        assert [each[begun] for each in ledger(tmp_path / "run")[what]] == [each[begun] for each in expected]
        states = [torch.load(tmp_path / name / "private" / "state" / state) for name in ("run", what)]
        first, second = (torch.utils._pytree.tree_leaves(each) for each in states)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_run_keeps_its_budget_and_continues_with_a_larger_one(tmp_path, monkeypatch, clock, caplog):
    """With shadows, which are trained as long as the Student, on a machine that becomes half as fast after a round."""
    whole = files.write_json

    def write_and_slow_down(path, value):
        whole(path, value)
        if noted("rounds", "val_loss")(path, value):
            clock["slowness"] = 2

    monkeypatch.setattr(files, "write_json", write_and_slow_down)
    out, shadows = tmp_path / "run", {"num_shadows": 4, "student_shadows": 4}
    result = recycle(config(out, "16s", **shadows))
    first = ledger(out)
    assert 0.7 * 16 < clock["now"] < 1.1 * 16
    assert sum(result.metrics["stages"].values()) == pytest.approx(clock["now"], rel=0.1)
    assert [row["step"] for row in result.metrics["checkpoints"]] == [each["end"] for each in first["rounds"]]
    told = result.metrics["budget"]
    assert told["rounds"] == first["rounds"]
    assert "continues" in (out / "release" / "report.md").read_text() or not told["still_improving"]
    before = clock["now"]
    (words,) = first["notes"]
    assert "was divided anew" in words
    assert words in caplog.text
    assert words[1:] in (out / "release" / "report.md").read_text()  # where it begins a sentence
    larger = recycle(config(out, "20s", **shadows))
    assert ledger(out)["rounds"] == first["rounds"]  # the time is too short for a better generator and a Student of it
    assert ledger(out)["cycles"][: len(first["cycles"])] == first["cycles"]
    assert len(ledger(out)["cycles"]) > len(first["cycles"])
    assert clock["now"] - before < 1.1 * 20 - 0.7 * 16
    assert larger.metrics["config"]["budget"] == "20s"
    (out / "release" / "report.md").unlink()
    recycle(config(out, "20s", **shadows))
    assert words[1:] in (out / "release" / "report.md").read_text()  # where it begins a sentence
    with pytest.raises(UserError, match="run: budget must be at least the 20.0 s of the run in .*, got 16s"):
        recycle(config(out, "16s", **shadows))
    with pytest.raises(UserError, match="run: budget must equal '20s' of the run in .*, got ''; choose another --out"):
        recycle(config(out, "", **shadows))


def test_budget_too_short_for_a_pass_is_refused_with_the_least_that_does(tmp_path, clock):
    with pytest.raises(
        UserError, match=r"run: budget must be at least \d+[sm], which one pass .* takes here, got 1s"
    ) as caught:
        recycle(config(tmp_path / "run", "1s"))
    assert not (tmp_path / "run").exists()
    least = str(caught.value).split("at least ")[1].split(",")[0]
    plan = dry_run(config(tmp_path / "run", least))
    for words in (f"budget: {least}", "# plan: generator in rounds up to step", "# plan: Student of"):
        assert words in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["30", "half an hour", "-5m", "0m", "1d", "m"])
def test_no_time_is_refused(text):
    with pytest.raises(UserError, match="run: budget must be a time above 0 such as 90s, 30m or 1h30m, got"):
        RecycleConfig(budget=text)
