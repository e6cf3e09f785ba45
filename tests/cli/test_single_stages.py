"""``kr-fast generator`` and ``kr-fast distil``: each leaves what others read, and trains nothing else.

Sizes: 60 images of 8 px in two classes, the least that leaves both splits of both; 4 steps and 2 periods go through
every branch of a training that is longer.
"""

import dataclasses
import json
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import tracking
from cli_cases import refused
from safetensors.torch import load_file

from kr_fast.cli import main
from kr_fast.recycling import RecycleConfig, distil, train_generator
from kr_fast.recycling.commands import DISTIL, GENERATOR
from kr_fast.recycling.presets import preset

pytestmark = pytest.mark.usefixtures("released_run")
SHORT = ["--preset", "toy", "--quiet"]
OF_STUDENT = ["--images", "32", "--periods", "2", "--tune-confidence", "--tune-noise-scale", "--tune-guidance-scale"]


class Notes(tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    told: ClassVar[list[tuple[dict, int | None]]] = []
    options: ClassVar[dict] = {}

    def __init__(self, run_name, logging_dir=None, **rest):
        super().__init__()
        self.folder = logging_dir

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        Notes.options = values

    def log(self, values, step=None, **rest):
        Notes.told.append((values, step))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set, a trained generator, and a Student of a factory's Teacher and ready images, tracked."""
    folder = tmp_path_factory.mktemp("stages")
    random, arrays = np.random.default_rng(0), {}
    for name, count in (("train", 60), ("val", 20), ("test", 24)):
        labels = np.arange(count) % 2
        pixels = random.integers(0, 100, (count, 8, 8), np.uint8) + 100 * labels[:, None, None].astype(np.uint8)
        arrays |= {f"{name}_images": pixels, f"{name}_labels": labels}
    np.savez(folder / "patients.npz", **arrays)
    np.savez(folder / "ready.npz", images=arrays["train_images"][:40], labels=arrays["train_labels"][:40])
    (folder / "own_teacher.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    head = torch.nn.Linear(1, 2)\n    head.weight.data[:] = torch.tensor([[-4.0], [4.0]])\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Notes)
        patch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType("tensorboard")])
        Notes.told = []
        data = [*SHORT, "--data", "patients.npz", "--log-with", "tensorboard"]
        assert main(["generator", *data, "--out", "generator", "--generator-steps", "4"]) == 0
        teacher = ["--teacher", "own_teacher:make", "--generator", "ready.npz"]
        assert main(["distil", *data, *OF_STUDENT, *teacher, "--out", "student"]) == 0
        yield folder


def stages(folder):
    return list(json.loads((folder / "journal.json").read_text()))


def test_a_generator_alone_is_what_others_read(folders, capsys):
    from diffusers import UNet2DModel

    out = folders / "generator"
    assert stages(out) == ["data", "generator"]
    assert not any((out / "release").iterdir())
    assert main(["synthesize", "--model", str(out), "--out", str(folders / "set"), "--count", "6", "--quiet"]) == 0
    assert np.load(next((folders / "set").glob("*images*.npy"))).shape == (6, 8, 8, 1)
    last = out / "private" / "generator" / "step-000004"
    network = UNet2DModel.from_pretrained(last / "unet")
    assert (network.config.num_class_embeds, network.config.in_channels) == (3, 1)  # with a null class
    before = (last / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    capsys.readouterr()
    again = [*SHORT, "--data", str(folders / "patients.npz"), "--generator-steps", "4", "--out", str(out)]
    assert main(["generator", *again]) == 0
    assert "step-000004" in capsys.readouterr().out
    assert (last / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    line = refused(capsys, "export", out, folders / "exported")
    assert "RUN must be the folder of a run that has a Student, got" in line
    line = refused(capsys, "run", *again)
    assert "command must equal 'generator' of the run in" in line
    line = refused(capsys, "run", "--quiet", "--config", out / "config.yaml", "--out", folders / "x")
    assert "config must be of kr-fast run" in line
    line = refused(capsys, "distil", *SHORT, "--teacher", out, "--generator", out, "--out", folders / "x")
    assert "teacher must be a run whose Teacher is trained" in line


def test_a_generator_is_that_of_a_run(folders, tmp_path, caplog):
    """In Python; options of other stages have no effect, and a line says so."""
    values = {**preset("toy"), "data": str(folders / "patients.npz"), "out": str(tmp_path / "g"), "generator_steps": 4}
    with caplog.at_level("WARNING", logger="kr_fast"):
        done = train_generator(RecycleConfig(**{**values, "periods": 7}))
    assert re.search(r"generator: left out, as this command has no such option: .*\bperiods\b", caplog.text)
    name = "unet/diffusion_pytorch_model.safetensors"
    first = load_file(folders / "generator" / "private" / "generator" / "step-000004" / name)
    assert done.checkpoint == tmp_path / "g" / "private" / "generator" / "step-000004"
    assert all(torch.equal(value, first[key]) for key, value in load_file(done.checkpoint / name).items())


def test_a_student_is_that_of_a_run_without_an_audit(folders, tmp_path):
    """Bit for bit; the Teacher is the run's own copy, whether it was a factory's or another run's."""
    options = ["--data", "patients.npz", "--generator", "generator", "ready.npz", "--num-inference-steps", "2"]
    same = ["--teacher", "student", *options, *OF_STUDENT]
    assert main(["distil", *SHORT, *same, "--out", str(tmp_path / "distil")]) == 0
    assert main(["run", *SHORT, *same, "--num-shadows", "0", "--out", str(tmp_path / "run")]) == 0
    student, teacher = "release/student.safetensors", "private/teacher.safetensors"
    assert (tmp_path / "distil" / student).read_bytes() == (tmp_path / "run" / student).read_bytes()
    own, given = load_file(tmp_path / "distil" / teacher), load_file(folders / "student" / teacher)
    assert own.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in own.items())
    metrics = json.loads((tmp_path / "distil" / "release" / "metrics.json").read_text())
    assert metrics["audit"] is None
    assert metrics["verdict"]["decision"] != "share"
    assert "kr-fast distil --config" in (tmp_path / "distil" / "release" / "report.md").read_text()
    assert main(["export", str(tmp_path / "distil"), str(tmp_path / "exported"), "--quiet"]) == 0
    config = str(tmp_path / "distil" / "config.yaml")
    assert main(["distil", "--quiet", "--config", config, "--out", str(tmp_path / "distil")]) == 0  # nothing is left


@pytest.mark.parametrize("command", [GENERATOR, DISTIL], ids=lambda command: command.name)
def test_help_lists_the_options_of_the_command_alone(capsys, command):
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    listed = {name.replace("-", "_") for name in re.findall(r"^  --(?!no-)([a-z-]+)", capsys.readouterr().out, re.M)}
    fields = {field.name for field in dataclasses.fields(RecycleConfig)}
    assert listed & fields == set(command.options)
    assert set(command.options) | command.values.keys() | command.defaults.keys() <= fields
    assert not {name for name in listed if name.startswith(("audit_", "canar", "checkpoint_", "ema_", "budget"))}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["distil", "--generator", "ready.npz"],
            "distil: teacher must be given: pkg.mod:factory, a file or the",
        ),
        (["distil", "--teacher", "own_teacher:make"], "distil: generator must be given: a folder, a file of images"),
        (["distil", "--teacher", ".", "--generator", "ready.npz"], "got ., a folder of something else"),
        (["generator", "--log-with", "wandb"], "log_with must name trackers whose packages are installed (pip install"),
        (["generator", "--log-with", "mail"], "log_with must name trackers of Accelerate (aim, "),
    ],
)
def test_what_is_missing_is_named(folders, tmp_path, capsys, arguments, words):
    line = refused(capsys, *arguments, *SHORT, "--data", "patients.npz", "--out", tmp_path / "out")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_student_needs_a_teacher_in_python_too(folders):
    with pytest.raises(ValueError, match="distil: generator must be given"):
        distil(RecycleConfig(teacher="own_teacher:make"))


def test_trackers_are_told_curves_and_figures_only(folders):
    told = [(name, value, step) for values, step in Notes.told for name, value in values.items()]
    assert all(type(value) is float for _, value, _ in told)
    steps = [(name, step) for name, _, step in told if step is not None]
    assert steps == [("generator/loss", 4), *((f"student/{key}", step) for step in (1, 2) for key in ("loss", "val"))]
    values = {name: value for name, value, _ in told}
    metrics = json.loads((folders / "student" / "release" / "metrics.json").read_text())
    assert values["student.test_accuracy"] == metrics["student"]["test_accuracy"]
    curve = json.loads((folders / "student" / "journal.json").read_text())["gkd"]["result"]["curves"]
    assert values["student/loss"] == curve["loss"][-1]
    assert values["teacher/val_accuracy"] == metrics["teacher"]["val_accuracy"]
    assert Notes.options["data"] == "patients.npz"
    assert str(folders) not in str(Notes.options)
    assert (folders / "student" / "private" / "logs").is_dir()
