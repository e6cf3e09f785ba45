"""A whole run with epsilon releases what the guarantee covers, and nothing that was computed without noise."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_cases import refused
from toy_runs import QUIET, context_of, toy

from kr_fast import data
from kr_fast.cli import main
from kr_fast.privacy import Gaussian, Ledger
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import few_step
from kr_fast.runtime.storage import layout

pytestmark = pytest.mark.pipeline
# The search for the noise takes longer than the run, so the noise is fixed here, and is enough.
FIXED = """
from kr_fast.privacy import accounting
from kr_fast.recycling.dp import ledger
accounting.GRID = 0.01
ledger.calibrate = lambda *a, **k: 2.0
"""
FLAGS = ["--epsilon", "8", "--num-shadows", "0", "--teacher-batch-size", "256", "--dp-multiplicity", "2"]
FLAGS += ["--generator-steps", "4", "--dp-physical-batch", "256", "--few-steps", "2", "--few-step-training", "3"]
RELEASED = {"student.safetensors", "student/model.safetensors", "student/config.json", "student/README.md"}
RELEASED |= {"synthetic/images.npy", "synthetic/labels.npy", "synthetic/README.md", "ledger.json"}


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("private") / "run"
    done = toy(out, *FLAGS, before=FIXED)
    return out, done.stdout


def metrics(out):
    return json.loads((out / "private" / "metrics.json").read_text())


def figures(value):
    """Every number of nested values that is no small integer, which also stands for other things."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in figures(each)]
    return [value] if isinstance(value, float) and value not in (0.0, 0.5, 1.0) else []


def texts(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".json")}


def test_what_is_released(private_run):
    release = private_run[0] / "release"
    assert {str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()} == RELEASED
    for name, entries in layout.GUARANTEED.items():
        found = {f"{path.name}/" if path.is_dir() else path.name for path in (private_run[0] / name).iterdir()}
        assert found - {"release/", "private/"} <= entries.keys(), name
    assert (private_run[0] / "README.txt").read_text() == layout.readme(True)


def test_no_figure_of_real_images_is_released(private_run):
    """Neither the report's figures nor losses, class counts, sizes of splits, fingerprints or notes on the data."""
    out, digits = private_run[0], data.load("digits")
    journal = json.loads((out / "journal.json").read_text())
    result = metrics(out)
    measured = {name: result[name] for name in ("teacher", "student", "student_minus_teacher", "synthetic")}
    curves = [stage["result"].get("curves", {}) for stage in journal.values()]
    numbers = set(figures([measured, curves]))
    assert len(numbers) > 50
    counts = digits.train.labels.bincount().tolist()
    forbidden = {text for number in numbers for text in (f"{number:.6g}", str(number)) if len(text) > 6}
    forbidden |= {digits.fingerprint, str(counts), str(counts[:3])[1:-1], str(out)}
    forbidden |= {"accuracy", "AUC", "validation", "%"}
    for path, text in texts(out / "release").items():
        assert [each for each in forbidden if each in text] == [], path


def test_no_real_image_is_released(private_run):
    pixels = (private_run[0] / "release" / "synthetic" / "images.npy").read_bytes()
    digits = data.load("digits")
    for split in (digits.train, digits.val, digits.test):
        assert not any(image.numpy().tobytes() in pixels for image in split.images)


def test_the_guarantee_follows_from_the_ledger(private_run):
    out, shown = private_run
    ledger = Ledger.read(out / "release" / "ledger.json")
    told = metrics(out)["guarantee"]
    assert list(ledger.spent) == ["class counts", "teacher", "generator"]
    assert 0 < told["epsilon"] <= 8
    assert told["epsilon"] == pytest.approx(ledger.epsilon(), rel=0.05)  # there on a finer grid
    assert told["private"]
    assert ledger.spent["generator"].steps == 4
    for card in ("student", "synthetic"):
        text = (out / "release" / card / "README.md").read_text()
        assert "1e-05)-differentially private for every training image" in text
    assert "differentially private" in shown
    assert "alone may be handed on" in shown


def test_no_choice_was_made(private_run):
    journal = json.loads((private_run[0] / "journal.json").read_text())
    results = {name: stage["result"] for name, stage in journal.items()}
    assert results["checkpoints"] == {"chosen": 4, "rows": []}
    assert results["tuning"]["rows"] == []
    assert results["gkd"]["best_period"] == 3
    assert "memorisation" not in results["generator"]
    assert results["few_step"]["notes"] == []
    assert not any(name.startswith("val_") for name in (*results["few_step"], *results["few_step"]["many_step"]))
    report = (private_run[0] / "private" / "report.md").read_text()
    assert "No choice was made on real images" in report
    assert "They are no part of the release" in report


def test_what_is_released_is_made_of_teacher_and_generator_alone(private_run, tmp_path):
    """With other images in all splits the Student and its images are the same, to the byte."""
    shutil.copytree(private_run[0], tmp_path / "run")
    context = context_of(tmp_path / "run")
    released = [context.folder.student, context.folder.images, context.folder.labels]

    def made():
        """In this process both times: another number of threads rounds otherwise."""
        shutil.rmtree(context.folder.few_step)
        for path in released:
            path.unlink()
        few_step.run(context)
        gkd.run(context)
        networks = list(context.folder.few_step.rglob("*.safetensors"))
        assert len(networks) == 1
        return [path.read_bytes() for path in released + networks]

    before = made()
    draw = torch.Generator().manual_seed(0)
    splits = {}
    for name in ("train", "val", "test"):
        split = getattr(context.data, name)
        images = torch.randint(256, split.images.shape, generator=draw).byte()
        splits[name] = data.Split(images, torch.randint(10, split.labels.shape, generator=draw))
    context.data = dataclasses.replace(context.data, **splits)
    assert made() == before


def test_two_processes_train_together_and_spend_once(private_run, tmp_path):
    script, out = tmp_path / "run.py", tmp_path / "run"
    script.write_text(f"import sys\n{FIXED}\nfrom kr_fast.cli import main\nsys.exit(main(sys.argv[1:]))")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [sys.executable, *launcher, "run", "--preset", "toy", "--out", str(out), *FLAGS]
    command += ["--periods", "1", "--images", "64"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    spent, journal = Ledger.read(out / "release" / "ledger.json").spent, json.loads((out / "journal.json").read_text())
    assert spent == Ledger.read(private_run[0] / "release" / "ledger.json").spent
    for name, own in (("teacher", Gaussian(2.0, 256 / 1019, 8)), ("generator", Gaussian(2.0, 32 / 1019, 4))):
        assert spent[name] == own
        curves = journal[name]["result"]["curves"]
        assert curves["step"] == list(range(1, own.steps + 1))
        assert all(0 < loss < 10 for loss in curves["loss"])  # of the rows that both have drawn


def test_another_epsilon_needs_another_folder(private_run, capsys, tmp_path):
    flags = [*FLAGS[:1], "4", *FLAGS[2:]]
    line = refused(capsys, "run", "--preset", "toy", "--out", private_run[0], *flags)
    assert "epsilon must equal 8.0 of the run in" in line
    line = refused(capsys, "run", "--preset", "toy", "--out", private_run[0], "--num-shadows", 0)
    assert "of the run in" in line


def test_an_export_has_the_guarantee_and_no_figure(private_run, tmp_path, capsys):
    out = private_run[0]
    assert main(["export", str(out), str(tmp_path / "export"), "--format", "npz"]) == 0
    assert "kr_fast.load_student reads it; the guarantee is in its README.md" in capsys.readouterr().out
    assert (tmp_path / "export" / "ledger.json").read_bytes() == (out / "release" / "ledger.json").read_bytes()
    for path, text in texts(tmp_path / "export").items():
        assert "accuracy" not in text, path
        assert "not differentially private" not in text, path
    assert "differentially private" in (tmp_path / "export" / "synthetic" / "croissant.json").read_text()


def test_an_export_says_what_contradicts_the_guarantee(private_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kr_fast.report.guarantee.contradiction", lambda metrics: "An attack proves more.")
    assert main(["export", str(private_run[0]), str(tmp_path / "export"), "--format", "npz"]) == 0
    assert "An attack proves more.\n" in capsys.readouterr().out


def test_a_changed_ledger_is_not_exported(private_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(private_run[0], out)
    path = out / "release" / "ledger.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 3'))
    assert main(["export", str(out), str(tmp_path / "export")]) == 2
    assert "ledger.json" in capsys.readouterr().err


def test_synthesis_draws_classes_as_they_may_be_told(private_run):
    out = private_run[0]
    journal = json.loads((out / "journal.json").read_text())
    for generator in ("generator/step-000004", "few_step"):
        facts = json.loads((out / "private" / generator / "objective.json").read_text())
        assert facts["class_counts"] == journal["privacy"]["result"]["class_counts"]
    labels = np.load(out / "release" / "synthetic" / "labels.npy")
    assert len(labels) == 128
