"""Shadow Students: which images and Teachers they learn from, that their audit is theirs, and who trains them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import context_of, metrics, new_context

from kr_fast import report
from kr_fast.ensemble.shadows import data_digest
from kr_fast.membership import denoising_attack, lira, roc
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.preflight import memory_and_disk, networks, time_estimate
from kr_fast.recycling.stages import auditing, reporting, shadows
from kr_fast.recycling.stages.distillation import gkd, shadow_students
from kr_fast.recycling.stages.generation import generator, generator_attack
from kr_fast.report.tables import interval, number
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files, layout

pytestmark = pytest.mark.pipeline


def without(source: Path, out: Path, stages: tuple[str, ...], *names: str) -> None:
    """A copy of a run in which some stages are not done yet, and some files are missing."""
    shutil.copytree(source, out)
    for name in ("release/metrics.json", *names):
        (out / name).unlink()
    path = out / "journal.json"
    journal = {key: value for key, value in json.loads(path.read_text()).items() if key not in stages}
    path.write_text(json.dumps(journal))


def test_number_of_shadow_students():
    assert RecycleConfig().num_students == RecycleConfig().num_shadows == 16
    assert RecycleConfig(num_shadows=8).num_students == 8
    assert RecycleConfig(num_shadows=8, student_shadows=4).num_students == 4
    assert RecycleConfig(student_shadows=0).num_students == 0
    assert RecycleConfig(num_shadows=0).num_students == 0


def test_shared_images_are_those_that_the_student_saw(finished, tmp_path):
    run = context_of(finished[0])
    job = shadow_students.Job(Context(run.config, tmp_path, run.runtime, run.data, run.journal))
    result = gkd.drawn(run, job.sampling, run.config.images, kept=job.shared)(2)
    for name, values in zip(("ids", "labels", "images"), result, strict=True):
        assert np.array_equal(values.numpy(), np.load(getattr(run.folder, name))), name
    for kept, values in zip(job.shared.load(2), result, strict=True):
        assert torch.equal(kept, values)


def test_the_full_audit_is_lira_on_the_shadow_students(finished):
    """Scores recomputed from the files: signals of Student and shadow Students, keep of their Teachers."""
    run = context_of(finished[0])
    images, labels, members = shadows.pool(run)
    result = shadow_students.load(run)
    assert torch.equal(result.keep, shadows.keep(run))
    phi = result.array.signals(images, labels)["phi"]
    student = type(result.array)([gkd.load(run)]).signals(images, labels)["phi"]
    expected = lira(phi, result.keep, variance="fixed", target=student)[0]
    with np.load(finished[0] / "private" / "audit.npz") as archive:
        scores, transfer = archive["student_full/lira/scores"], archive["student/lira/scores"]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert not np.allclose(scores, transfer, rtol=1e-3)
    audit = metrics(finished[0])["audit"]
    assert audit["student_full"]["lira"]["auc"] == roc(torch.from_numpy(scores), members).auc
    for folder in ("shadows", "shadow_students"):
        assert files.read_json(finished[0] / "private" / folder / "shadows.json")["data"] == data_digest(images, labels)


def test_a_shadow_student_learns_from_its_own_teacher(finished):
    """Each answers as its Teacher does more than as the other Teachers do, on images that it learned from."""
    run = context_of(finished[0])
    images = torch.from_numpy(np.load(run.folder.images))
    students, teachers = (each.load(run).array(images) for each in (shadow_students, shadows))
    # The size of what all models share would hide the rest: what is left of each after the mean over models.
    students, teachers = (each.log_softmax(2) for each in (students, teachers))
    students, teachers = (each - each.mean(0, keepdim=True) for each in (students, teachers))
    agreement = torch.einsum("anc,bnc->ab", students, teachers)
    assert (agreement.argmax(1) == torch.arange(4)).float().mean() >= 0.75, agreement


def test_setting_says_what_was_run(finished, audited):
    for (out, _), kind, shared in (
        (finished, "shared", "the generator (trained on all members) and its images"),
        (audited, "retrained", "the tuned sampling"),
    ):
        result = metrics(out)
        targets = result["audit"]["setting"]["targets"]
        assert {name: facts["kind"] for name, facts in targets.items() if not facts["control"]} == {
            "teacher": "full",
            "student": "transfer",
            "student_full": "full",
            "released": "released",
        }
        assert targets["student_full"]["shared"] == shared
        assert targets["released"]["images"] == result["config"]["images"]
        assert result["audit"]["setting"]["shadow_sets"]["student_full"]["models"] == 4
        assert [targets[name]["recipe"] for name in ("teacher", "student", "student_full")] == [
            "equal",
            "unknown",
            "equal",
        ]
        made = result["audit"]["released_tests"]["released"]
        assert made["pixels"]["synthetic"] == made["features"]["synthetic"] == result["config"]["images"]
        assert "Tests of the released images" in (out / "release" / "report.md").read_text()
        paired = result["audit"]["comparison"]
        assert set(paired) == {"student", "student_full"}
        gap = result["audit"]["teacher"]["lira"]["auc"] - result["audit"]["student_full"]["lira"]["auc"]
        assert paired["student_full"]["lira"]["difference"] == pytest.approx(gap)
        assert f"Student, full ({kind} generator)" in (out / "release" / "report.md").read_text()


def test_a_teacher_that_was_given_is_a_transfer(finished, tmp_path):
    """No shadow was made as it was, and so none as its Student was."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    run = context_of(out)
    changed = {"teacher": str(finished[0] / "private" / "teacher.safetensors"), "leave_out_duplicates": True}
    run.config = dataclasses.replace(run.config, **changed)
    audit, notes = auditing.run(run)["audit"], "is attacked with shadows that were not made as it was (transfer)"
    for name in ("teacher", "student", "student_full"):
        facts = audit["setting"]["targets"][name]
        assert facts["kind"] == "transfer"
        assert any(line.startswith(f"{facts['title']} {notes}") for line in audit["setting"]["notes"])
    assert audit["setting"]["duplicates"]["left_out"]


def test_control_and_page(finished, audited):
    assert metrics(finished[0])["audit"]["setting"]["control"] is None
    assert "no positive control" in (finished[0] / "release" / "report.md").read_text()
    control = metrics(audited[0])["audit"]["setting"]["control"]
    assert control["name"] == "control"
    assert (audited[0] / "private" / "control.safetensors").exists()
    assert "positive control" in audited[1]
    assert (audited[0] / "release" / "audit.html").exists()
    run, written = context_of(audited[0]), files.read_json(audited[0] / "release" / "audit.json")["details"]
    assert set(written["versions"]) == {"kr_fast", "python", *reporting.PACKAGES}
    assert written["command"] == reporting.command(run)
    assert written["config"] == report.without_folders(run.config.record())
    assert not (finished[0] / "release" / "audit.html").exists()


def test_folder_says_of_every_entry_who_may_have_it(finished, audited):
    for out, _ in (finished, audited):
        for name, entries in layout.ENTRIES.items():
            result = {f"{path.name}/" if path.is_dir() else path.name for path in (out / name).iterdir()}
            assert result - {"release/", "private/"} <= entries.keys(), name
        student = {out / "release" / "student" / name for name in ("model.safetensors", "config.json", "README.md")}
        allowed = "student.safetensors images.npy labels.npy report.html report.md metrics.json audit.html audit.json"
        for path in (out / "release").rglob("*.*"):
            assert path.name in allowed.split() or path.parent.name == "figures" or path in student, path


def test_generators_are_retrained_on_the_halves(audited):
    run = context_of(audited[0])
    _, labels, _ = shadows.pool(run)
    weights = []
    for index, kept in enumerate(shadows.keep(run)):
        folder = audited[0] / "private" / "shadow_students" / f"generator-{index:03d}"
        counts = files.read_json(folder / "objective.json")["class_counts"]
        assert counts == torch.bincount(labels[kept], minlength=10).tolist()
        weights.append(generator.load(folder, torch.device("cpu"))[0].conv_in.weight)
    for first in range(4):
        for second in range(first):
            assert not torch.equal(weights[first], weights[second])


def test_the_weights_are_attacked_against_retrained_generators(audited):
    """Errors of one of them and the scores recomputed from the files; the page tells the figures of the JSON."""
    run = context_of(audited[0])
    folder, (_, _, members) = run.folder, shadows.pool(run)
    errors = [np.load(generator_attack.shadow_file(run, index)) for index in range(4)]
    again = generator_attack.errors_of(run, folder.shadow_students / "generator-002")
    np.testing.assert_allclose(errors[2], again, rtol=1e-5)
    with np.load(folder.denoising) as archive:
        arrays = dict(archive)
    assert arrays["index"].tolist() == list(range(len(members)))
    calibration = {"shadows": torch.from_numpy(np.stack(errors)), "keep": shadows.keep(run)}
    scores = denoising_attack(torch.from_numpy(arrays["errors"]), **calibration)
    np.testing.assert_allclose(arrays["scores"], scores, rtol=1e-12)
    figures, curve = metrics(audited[0])["audit"]["generator"], roc(scores, members)
    assert figures["calibration"] == "retrained"
    assert figures["generators"] == figures["recipe"]["targets"] == 4
    assert (figures["auc"], figures["auc_ci"]) == (curve.auc, list(curve.auc_interval()))
    assert (figures["members"], figures["non_members"]) == (curve.positives, curve.negatives)
    assert files.read_json(folder.audit_figures)["generator"] == figures
    for page in ("report.html", "report.md", "audit.html"):
        assert f"{number(curve.auc)} {interval(figures['auc_ci'])}" in (folder.release / page).read_text(), page


@pytest.mark.parametrize(("chosen", "calibration"), [(9, "image"), (12, "early checkpoint")])
def test_the_weights_are_attacked_without_retrained_generators(finished, monkeypatch, chosen, calibration):
    """An earlier checkpoint calibrates where there is one (here of steps 9 and 12); 40 records of a side are drawn."""
    run = context_of(finished[0])
    run.config = dataclasses.replace(run.config, audit_generator_weights=True)
    results = {stage: run.result(stage) for stage in ("generator", "tuning")}
    assert results["generator"]["checkpoints"] == [9, 12]
    results["tuning"] = {"sampling": {**results["tuning"]["sampling"], "checkpoint": chosen}}
    monkeypatch.setattr(run, "result", results.get)
    monkeypatch.setattr(generator_attack, "MOST", 40)
    members = shadows.pool(run)[2]
    figures, arrays = generator_attack.run(run, torch.arange(len(members)))
    assert (figures["members"], figures["non_members"], figures["calibration"]) == (40, 40, calibration)
    arrays = {name: torch.from_numpy(value) for name, value in arrays.items()}
    assert torch.equal(arrays["members"], members[arrays["index"]])
    options = {"images": shadows.pool(run)[0][arrays["index"]], "seed": seeds.derive(0, "generator attack")}
    for columns, row in ((slice(None), figures), (slice(1, 2), figures["by_level"][1])):
        early = {"early": arrays["early"][:, columns]} if chosen == 12 else {}
        scores = denoising_attack(arrays["errors"][:, columns], **early, **options)
        assert row["auc"] == roc(scores, arrays["members"]).auc
    left = arrays["index"][5:]  # five members were left out as near-duplicates
    figures, fewer = generator_attack.run(run, left)
    assert (figures["members"], figures["non_members"]) == (35, 40)
    assert np.array_equal(fewer["errors"], arrays["errors"][5:])


def test_the_attack_on_the_weights_is_planned(tmp_path):
    """A checkpoint at a quarter of the training, time at one second an image, and a file more."""
    c = RecycleConfig()
    assert generator.early_step(c) == [125]
    assert generator.early_step(dataclasses.replace(c, audit_generator="retrained")) == []
    assert generator.early_step(dataclasses.replace(c, audit_generator_weights=False)) == []
    assert generator.early_step(dataclasses.replace(c, num_shadows=0)) == []
    assert generator.early_step(dataclasses.replace(c, generator_steps=2, checkpoints=1)) == [1]
    assert generator.early_step(dataclasses.replace(c, generator_steps=1, checkpoints=1)) == []
    one = time_estimate.Rates(*[1.0] * len(dataclasses.fields(time_estimate.Rates)))
    for kind, audit, students in (("shared", 2, 0), ("retrained", 1, 2)):
        with_it, without = (
            new_context(tmp_path, (100, 9, 10), audit_generator=kind, audit_generator_weights=value)
            for value in (True, False)
        )
        (new, more), (old, less) = (
            (time_estimate.stages(each, one), memory_and_disk.disk_needs(each, networks.sizes(each)))
            for each in (with_it, without)
        )
        calls, turns = 110 * 12, 4 // min(torch.get_num_threads(), 4)
        assert new["audit"] - old["audit"] == audit * calls
        assert new["shadow_students"] - old["shadow_students"] == (turns * calls if students else 0)
        sizes = networks.sizes(with_it).generator.state
        assert sum(need.size for need in more) - sum(need.size for need in less) == (sizes if kind == "shared" else 0)
        costs = [time_estimate.costs(each, one)[1] for each in (with_it, without)]
        spared = costs[0].get("shadow_students", 0) - costs[1].get("shadow_students", 0)
        assert spared == (turns * calls if students else 0)


def test_a_generator_trained_alone_is_the_runs(finished, tmp_path):
    """The run's own split and seed, without Accelerate and up to an earlier checkpoint: the same weights."""
    run = context_of(finished[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run; sums are taken in the same order
    try:
        options = {"seed": run.config.seed, "state_path": tmp_path / "state.pt", "single_process": True}
        generator.train(run, run.data.train, [9], lambda step: tmp_path / f"{step}", **options)
    finally:
        torch.set_num_threads(threads)
    result = generator.load(tmp_path / "9", torch.device("cpu"))[0].state_dict()
    expected = generator.load(run.folder.generator(9), torch.device("cpu"))[0].state_dict()
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


def test_worker_processes_train_the_same_models(tmp_path, finished, audited):
    """Two threads: two workers of one thread each, as the runs had. Two models are missing, and the images too.

    Beside them the workers train the positive control, which the second run trained in its audit.
    """
    out = tmp_path / "run"
    gone = tuple(f"private/shadow_students/model-{index:03d}.safetensors" for index in (1, 3))
    without(finished[0], out, ("shadow_students", "audit", "report"), *gone)
    kept = (out / "private" / "shadow_students" / "model-000.safetensors").stat().st_mtime_ns
    run, threads = context_of(out), torch.get_num_threads()
    run.config = dataclasses.replace(run.config, audit_control=True)
    torch.set_num_threads(2)
    try:
        shadow_students.run(run)
    finally:
        torch.set_num_threads(threads)
    assert (out / "private" / "shadow_students" / "model-000.safetensors").stat().st_mtime_ns == kept
    for name, expected in (*((name, finished) for name in gone), ("private/control.safetensors", audited)):
        assert (out / name).read_bytes() == (expected[0] / name).read_bytes(), name
    assert os.listdir(out / "private" / "state") == ["trials.json"]
