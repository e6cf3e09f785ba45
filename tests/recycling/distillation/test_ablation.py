"""The 2x2 ablation of a run that was killed in it, with a Student of another architecture than the Teacher's."""

import dataclasses
import signal

import pytest
import torch
from toy_runs import context_of, metrics, toy

from kr_fast.ensemble import accuracy
from kr_fast.membership.verdict.paths import check_paths, figures
from kr_fast.recycling.config import NAMES
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import ablation, gkd
from kr_fast.runtime import seeds

pytestmark = pytest.mark.pipeline
# Mixtures, a filter that drops some images, and two periods of eight steps.
FLAGS = ["--ablation", "--student-arch", "resnet14", "--student-mixup", "1", "--confidence", "0.05", "--images", "64"]
FLAGS += ["--periods", "2", "--student-batch-size", "16", "--student-epochs", "2", "--num-shadows", "0"]
# The first Student is there, and the second has one period behind it.
KILL = """
import os, signal
from kr_fast.runtime.storage import files
save = files.save_state
def save_and_die(path, *rest):
    save(path, *rest)
    if path.name == "model-class-regenerated.pt": os.kill(os.getpid(), signal.SIGKILL)
files.save_state = save_and_die
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "run"
    toy(out, *FLAGS, before=KILL, check=-signal.SIGKILL)
    assert [path.name for path in (out / "private" / "ablation").glob("model-*")] == ["model-class-fixed.safetensors"]
    toy(out, *FLAGS)
    return out


def test_each_student_is_that_of_its_own_options(run):
    """Trained here without a kill, on sets that are drawn anew; the run's own is as without an ablation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the run: the number decides the last bits
    context, rows = context_of(run), metrics(run)["ablation"]
    sampling, students = gkd.tuned_sampling(context), []
    for labels, fixed in (("class", True), ("class", False), ("soft", True), ("soft", False)):
        config = dataclasses.replace(context.config, labels=labels, fixed_images=fixed, ablation=False)
        changed = dataclasses.replace(context, config=config)
        model = context.seeded("resnet14", 4, "student")
        draw, schedule = gkd.drawn(changed, sampling, config.images), gkd.student_schedule(changed)
        options = {"confidence": sampling.confidence, "seed": seeds.derive(config.seed, "student")}
        gkd.distil(changed, teacher.load(context), model, draw, schedule, **options)
        students.append(model)
    torch.set_num_threads(threads)
    assert [(row["labels"], row["regenerated"]) for row in rows] == [
        ("class", False),
        ("class", True),
        ("soft", False),
        ("soft", True),
    ]
    assert [row["of_run"] for row in rows] == [False, False, False, True]
    for row, model in zip(rows, students, strict=True):
        variant = ablation.Variant(row["labels"], row["regenerated"])
        saved = gkd.load(context) if row["of_run"] else ablation.load(context, variant)
        for name, value in saved.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (row["labels"], row["regenerated"], name)
        assert row["val_accuracy"] == accuracy(model, context.data.val)
        assert row["test_accuracy"] == accuracy(model, context.data.test)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in students]
    assert all(not torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))


def test_what_the_run_says_of_it(run):
    result = metrics(run)
    rows = result["ablation"]
    assert rows[3]["test_accuracy"] == result["student"]["test_accuracy"]
    assert rows[3]["val_accuracy"] == result["student"]["val_accuracy"]
    assert result["stages"]["ablation"] > 0
    paths = [path for path in figures(None, {**result, "config": {}, "versions": {}}) if path.startswith("ablation")]
    assert len(paths) == 8
    check_paths("run", [f"{path}=1" for path in paths], NAMES)
    text = (run / "release" / "report.md").read_text()
    brought = 100 * (rows[3]["test_accuracy"] - rows[0]["test_accuracy"])
    assert f"both together bring {brought:+.2f}" in text
    assert not (run / "private" / "state" / "shadow_students").exists()
