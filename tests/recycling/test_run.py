"""The whole pipeline at toy size: what it leaves behind, and what a user's own Teacher changes."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from toy_runs import metrics, toy

from kr_fast import data
from kr_fast.models import classifier
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.pipeline import recycle
from kr_fast.recycling.preflight import memory_and_disk, networks
from kr_fast.report.sentences import OF_RUN, verdict
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import Journal

pytestmark = pytest.mark.pipeline
STAGES = [
    "data",
    "teacher",
    "generator",
    "checkpoints",
    "tuning",
    "gkd",
    "student",
    "shadows",
    "shadow_students",
    "audit",
]


def test_metrics_have_the_promised_keys(finished):
    result = metrics(finished[0])
    for model in ("teacher", "student"):
        assert 0 <= result[model]["test_accuracy"] <= 1
        assert result["aop"][model] > 0
        for attack in ("lira", "lira_offline", "loss"):
            figures = result["audit"][model][attack]
            low, high = figures["auc_ci"]
            assert 0 <= low <= figures["auc"] <= high <= 1
            for fpr, each in figures["tpr_at_fpr"].items():
                assert 0 < float(fpr) < 1
                assert (each["tpr"] is None) == (not each["point_claim"])  # no point claim, no number
                if each["point_claim"]:
                    assert each["interval"][0] <= each["tpr"] <= each["interval"][1]
        accuracy, auc = result[model]["test_accuracy"], result["audit"][model]["lira"]["auc"]
        assert result["aop"][model] == pytest.approx(accuracy / (2 * max(auc, 0.5)) ** 2)
    assert result["cas_gap"] == result["teacher"]["test_accuracy"] - result["student"]["test_accuracy"]
    assert list(result["stages"]) == STAGES
    assert all(seconds >= 0 for seconds in result["stages"].values())
    assert result["seed"] == result["config"]["seed"] == 0
    assert {"kr_fast", "torch", "diffusers", "accelerate", "numpy", "python"} <= result["versions"].keys()


def test_checkpoints_load_in_diffusers(finished):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    folders = sorted((finished[0] / "private" / "generator").iterdir())
    assert [folder.name for folder in folders] == ["step-000009", "step-000012"]
    for folder in folders:
        network = UNet2DModel.from_pretrained(folder / "unet")
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        # Ten classes and the null class of guidance.
        assert network.class_embedding.num_embeddings == 11
        with torch.inference_mode():
            x = network(torch.zeros(2, 1, 8, 8), 10, class_labels=torch.tensor([0, 10])).sample
        assert x.shape == (2, 1, 8, 8)


def test_models_and_images_lie_beside_the_report(finished):
    out = finished[0]
    for name in ("private/teacher", "release/student"):
        model = classifier("resnet8", num_classes=10, in_channels=1, width=4, image_size=8)
        model.load_state_dict(files.load_tensors(out / f"{name}.safetensors"))
    images, labels, ids = (
        np.load(out / name / "synthetic" / f"{what}.npy")
        for name, what in (("release", "images"), ("release", "labels"), ("private", "ids"))
    )
    assert images.shape == (128, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.shape == ids.shape == (128,)
    assert ids.tolist() == list(range(2 * 128, 3 * 128))  # the third and last period: ids that were never drawn before


def test_keep_matrix_is_recorded(finished):
    with np.load(finished[0] / "private" / "audit.npz") as archive:
        keep, members = archive["keep/teacher"], archive["members"]
    result = metrics(finished[0])
    assert keep.shape == (4, result["dataset"]["train"] + result["dataset"]["test"])
    assert (keep.sum(0) == 2).all()
    assert members.sum() == result["dataset"]["train"]


def test_files_are_as_large_as_was_estimated(finished):
    config = RecycleConfig(**yaml.safe_load((finished[0] / "config.yaml").read_text()))
    context = Context(config, finished[0], state.current(), data.load("digits"), Journal(finished[0]))
    expected = memory_and_disk.stages(memory_and_disk.disk_needs(context, networks.sizes(context)))
    private, release = finished[0] / "private", finished[0] / "release"
    shared = config.periods * config.images * (64 + 16)  # which the stage removes at its end
    for stage, paths, rest in (
        ("teacher", [private / "teacher.safetensors"], 0),
        ("shadows", [private / "shadows"], 0),
        ("shadow_students", [private / "shadow_students"], shared),
        ("gkd", [release / "student.safetensors", release / "synthetic", private / "synthetic"], 0),
    ):
        result = rest + sum(memory_and_disk.written(path) if path.is_dir() else path.stat().st_size for path in paths)
        assert result / 1.3 < expected[stage] < result * 1.3, stage


def test_validation_images_that_are_training_images(tmp_path):
    """There is no population then, and the report says so."""
    draw, result = np.random.default_rng(0), {}
    for which, count in (("train", 40), ("test", 20)):
        result[f"{which}_images"] = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        result[f"{which}_labels"] = np.arange(count) % 2
    np.savez(
        tmp_path / "set.npz", **result, val_images=result["train_images"][:12], val_labels=result["train_labels"][:12]
    )
    done = toy(tmp_path / "run", "--data", str(tmp_path / "set.npz"))
    words = "every validation image is a training or test image too: the run chooses by them, and its audit has no"
    assert words in done.stderr
    assert words in (tmp_path / "run" / "release" / "report.md").read_text()
    assert "rmia" not in metrics(tmp_path / "run")["audit"]["teacher"]


def test_report_is_one_file_that_loads_nothing(finished):
    text = (finished[0] / "release" / "report.html").read_text()
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "url(" not in text
    assert text.count("data:image/png;base64,") == 5  # images for light and dark pages, ROC, curves, seconds
    for words in ("not differential privacy", "Teacher (real images)", "LiRA online", "Checkpoint Optimisation"):
        assert words in text
    markdown = (finished[0] / "release" / "report.md").read_text()
    for link in re.findall(r"\]\((.*?)\)", markdown):
        assert (finished[0] / "release" / link).exists(), link
    assert "not differential privacy" in markdown


def test_last_screen(finished):
    verdict_lines, _, screen = finished[1].strip().partition("\n\n")
    assert verdict_lines.startswith(f"verdict: {metrics(finished[0])['verdict']['decision']}\n")
    lines = screen.splitlines()
    assert lines[0].split("  ")[-1] == "Teacher - Student, full"
    attacks = [f"{attack} AUC" for attack in ("LiRA online", "LiRA offline", "loss threshold")]
    rows = [f"{attack}, {which}" for attack in attacks for which in ("mean of 4 made alike", "this one")]
    rows = ["test accuracy", "test AUC", *rows, "AOP", "released images", "released images", "seconds"]
    assert [line.split("  ")[0] for line in lines[1:-2]] == rows
    assert lines[-2].startswith("images/s: generator training ")
    assert lines[-2] in (finished[0] / "release" / "report.md").read_text().replace("Images/s", "images/s")
    assert lines[-1] == f"report: {finished[0]}/release/report.html"


def test_recipes_stand_first(finished):
    """Figures of all shadow Teachers and Students, their difference in pairs; the paragraph of the audit's page."""
    result = metrics(finished[0])["audit"]
    teacher, student = (result["leave_one_out"][name]["lira"] for name in ("teacher", "student_full"))
    assert teacher["auc"]["interval"][0] <= teacher["auc"]["mean"] <= teacher["auc"]["interval"][1]
    gap = student["difference"]
    assert (gap["first"], gap["targets"]) == ("teacher", 4)
    assert gap["difference"] == pytest.approx(teacher["auc"]["mean"] - student["auc"]["mean"], abs=1e-9)
    text = (finished[0] / "release" / "report.md").read_text()
    assert verdict(result, OF_RUN) in text
    assert text.index("On average over 4 models made as the Teacher was") < text.index("the Teacher itself")


def test_own_teacher_from_a_factory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make(num_classes, in_channels):\n"
        "    torch.manual_seed(3)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))\n"
    )
    flags = ["--teacher", "mine:make", "--num-shadows", "0"]
    toy(tmp_path / "run", *flags, env={"PYTHONPATH": str(tmp_path)})
    result = metrics(tmp_path / "run")
    assert result["teacher"]["parameters"] == 650
    assert result["audit"] is None
    assert "No audit was run" in (tmp_path / "run" / "release" / "report.md").read_text()


def test_own_teacher_from_a_checkpoint(tmp_path, finished):
    flags = ["--teacher", str(finished[0] / "private" / "teacher.safetensors"), "--num-shadows", "0"]
    toy(tmp_path / "run", *flags)
    assert metrics(tmp_path / "run")["teacher"]["test_accuracy"] == metrics(finished[0])["teacher"]["test_accuracy"]


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_other_objectives(tmp_path, objective):
    toy(tmp_path / "run", "--generator-objective", objective, "--num-shadows", "0", "--label-plan", "balanced")
    labels = np.load(tmp_path / "run" / "release" / "synthetic" / "labels.npy")
    assert np.ptp(np.bincount(labels, minlength=10)) <= 1


def test_colour_images_of_an_odd_size_from_a_folder(tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, name in enumerate(("a", "b", "c")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(24 - 6 * label):
            pixels = draw.integers(0, 80, (11, 9, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.png")
    flags = "--student-shadows 0 --no-audit-released --teacher-flip --student-flip"
    toy(tmp_path / "run", "--data", str(tmp_path / "set"), *flags.split())
    assert np.load(tmp_path / "run" / "release" / "synthetic" / "images.npy").shape == (128, 11, 9, 3)
    result = metrics(tmp_path / "run")
    assert result["dataset"]["class_names"] == ["a", "b", "c"]
    assert set(result["audit"]) == {"teacher", "student", "comparison", "leave_one_out", "records", "setting"}
    text = (tmp_path / "run" / "release" / "report.md").read_text()
    assert "shadows of the Teacher's training only (a transfer attack), a lower bound" in text
    assert "The generator and the synthetic images were not attacked." in text
    # As frequent as in training (24 : 18 : 12), each to one image.
    counts = np.bincount(np.load(tmp_path / "run" / "release" / "synthetic" / "labels.npy"))
    assert np.allclose(counts / 128, np.array([24, 18, 12]) / 54, atol=0.03)


def test_a_run_goes_on_with_the_same_images_in_memory(finished, tmp_path):
    """The set of the file and that of arrays are one: nothing is made again; other images are refused."""
    shutil.copytree(finished[0], tmp_path / "run")
    values = yaml.safe_load(next((tmp_path / "run").rglob("config.yaml")).read_text())
    config = RecycleConfig(**values, out=str(tmp_path / "run"))
    held = data.load_uncut("digits")[2]["all"]
    result = recycle(config, data=(held.images.numpy(), held.labels.tolist()))
    assert result.metrics == metrics(finished[0])
    with pytest.raises(UserError, match=r"^run: data must be those .*, got others in images in memory"):
        recycle(config, data=(held.images.numpy()[::-1].copy(), held.labels.numpy()[::-1].copy()))
    with pytest.raises(
        UserError, match="^run: data must be left out of the configuration of a run on images in memory"
    ):
        recycle(
            RecycleConfig(**(values | {"data": "x.npz"}), out=str(tmp_path / "run")), data=(held.images, held.labels)
        )
