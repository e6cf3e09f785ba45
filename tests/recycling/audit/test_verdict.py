"""The verdict on a run: about the Student, its use, and taken from finished figures where only the limits change."""

import json
import shutil

import pytest
from toy_runs import WHOLE_AUDIT, metrics

from kr_fast.cli import main
from kr_fast.membership.verdict.paths import check_paths, figures
from kr_fast.recycling import pipeline, verdict
from kr_fast.recycling.config import NAMES, RecycleConfig
from kr_fast.recycling.presets import preset
from kr_fast.report.sections.verdict import lines
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import manifest

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_progress", "released_run", "one_thread")]


def test_a_finished_run_takes_other_limits(audited, tmp_path, capsys):
    """Nothing but the pages and their figures is written again, and those are then as the journal has them."""
    out = tmp_path / "run"
    shutil.copytree(audited[0], out)
    entries = json.loads((out / "journal.json").read_text())
    written = {path: path.stat().st_mtime_ns for path in (out / "private").rglob("*.*") if path.is_file()}
    command = ["run", "--preset", "toy", *WHOLE_AUDIT, "--out", str(out), "--quiet"]
    command += ["--fail-above", "student_full.auc_high=0.1", "--fail-above", "teacher.test_accuracy=1"]
    assert main(command) == 3
    result = metrics(out)
    assert capsys.readouterr().out.startswith(f"verdict: {result['verdict']['decision']}\n")
    assert next(iter(result)) == "verdict"
    first, second = (rule for rule in result["verdict"]["rules"] if rule["source"] == "asked")
    assert (first["passed"], second["passed"]) == (False, True)
    assert second["value"] == result["teacher"]["test_accuracy"]
    assert json.loads((out / "release" / "audit.json").read_text())["verdict"] == result["verdict"]
    assert (out / "release" / "audit.html").exists()
    after = json.loads((out / "journal.json").read_text())
    assert {name for name in after if after[name] != entries[name]} == {"report"}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    manifest.release()
    before = (out / "release" / "metrics.json").stat().st_mtime_ns
    assert main(command) == 3  # by the same limits there is nothing to write
    assert (out / "release" / "metrics.json").stat().st_mtime_ns == before


def test_a_path_that_no_figure_has_is_refused_first(tmp_path):
    with pytest.raises(UserError, match=r"run: fail_above must name .*nearest: student_full.auc_high, "):
        RecycleConfig(out=str(tmp_path), fail_above=("student_ful.auc_high=0.5",))


def test_every_figure_of_a_run_has_a_path(audited):
    result = metrics(audited[0])
    paths = figures(result["audit"], {**result, "config": {}, "versions": {}})
    check_paths("run", [f"{path}=1" for path in paths], NAMES)
    check_paths("run", ["audit.student_full.lira.auc=1"], NAMES)
    assert [name for name, _, _ in pipeline.STAGES] == [*NAMES.stages, "report"]


def of(result, accuracies, **changes):
    """The verdict on other accuracies of 1,000 test images."""
    teacher, student = ({"test_accuracy": value} for value in accuracies)
    facts = {**result, "teacher": teacher, "student": student, "cas_gap": accuracies[0] - accuracies[1]}
    config = RecycleConfig(**{**preset("toy"), **changes})
    return verdict.of_run(config, {**facts, "dataset": {"test": 1000}})


def test_lost_accuracy_is_a_reason_of_its_own(audited):
    """5 points are allowed. The interval of 8 is +- 3.3 (Newcombe's method 10), that of 9 ends above 5."""
    result = {**metrics(audited[0]), "audit": None}
    for student, decision, words in (
        (0.85, "not decided", "No membership attack was run"),
        (0.82, "not decided", "Whether the Student is of use is not known"),
        (0.81, "do not share", "The Student loses too much to be of use, which says nothing of leakage"),
    ):
        found = of(result, (0.9, student))
        assert found["decision"] == decision
        assert any(reason.startswith(words) for reason in found["reasons"])
    assert of(result, (0.9, 0.81), verdict_gap=10)["decision"] == "not decided"
    assert of(result, (0.9, 0.81))["chance"] == pytest.approx(0.025)
    assert of(result, (0.9, 0.95), fail_above=("accuracy_gap=0",))["rules"][-1]["value"] == pytest.approx(-5)


def test_a_shared_generator_and_a_transfer_only_bound_from_below(audited):
    result = json.loads(json.dumps(metrics(audited[0])))
    audit = result["audit"]
    audit["setting"]["shadow_sets"]["student_full"]["on_the_smaller_side"] = 8
    for generator, passed in (("shared", None), ("retrained", True)):
        rules = of(result, (0.9, 0.9), audit_generator=generator)["rules"]
        (rule,) = [rule for rule in rules if rule["path"] == "student_full.shadows_missing"]
        assert rule["passed"] is passed
        assert ("is not measured" in rule["words"]) == (generator == "shared")
    del audit["student_full"]
    rules = of(result, (0.9, 0.9))["rules"]
    assert "student.auc_high" in [rule["path"] for rule in rules]
    assert {rule["passed"] for rule in rules if rule["path"] == "student.shadows_missing"} == {None}


def test_lost_accuracy_of_images_in_groups_is_shown_by_groups():
    """The interval of 9 points is that of their resampling: 4 at its lower end is below the limit of 5, 6 above."""
    for low, decision in ((0.04, "not decided"), (0.06, "do not share")):
        facts = {"audit": None, "dataset": {"test": 1000}, "cas_gap": 0.09}
        facts["student_minus_teacher"] = {"accuracy": {"difference": -0.09, "interval": [-0.14, -low]}}
        facts["teacher"] = {"test_accuracy": 0.9, "test_groups": {"groups": 30, "resampled": True, "rows": []}}
        facts["student"] = {**facts["teacher"], "test_accuracy": 0.81}
        found = verdict.of_run(RecycleConfig(**preset("toy")), facts)
        assert found["decision"] == decision
        assert "The verdict is about the Student alone, not about the released images" in lines(found)[-1]
