"""The command line: bad input is one line, exit code 2, and nothing is left behind."""

import json
import subprocess
import sys

import cli_cases
import numpy as np
import pytest
import torch

import kr_fast
from kr_fast.backends import registry
from kr_fast.cli import main, run

pytestmark = pytest.mark.usefixtures("released_run")


def refused(capsys, *arguments):
    """The one line that a refused run prints."""
    return cli_cases.refused(capsys, "run", "--preset", "toy", "--quiet", *arguments)


def npz(path, classes=3, **changes):
    result = {}
    for which, count in (("train", 30), ("val", 9), ("test", 12)):
        result[f"{which}_images"] = np.random.default_rng(count).integers(0, 256, (count, 8, 8), np.uint8)
        result[f"{which}_labels"] = np.arange(count) % classes
    np.savez(path, **(result | changes))
    return path


def test_bad_data_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    cases = {
        "absent.npz": "data: source must be digits, a .npz, .parquet or .tar file, or a folder of images, got",
        str(npz(tmp_path / "one.npz", classes=1)): "data: number of classes must be 2 to 1000, got 1",
        str(npz(tmp_path / "small.npz", train_images=np.zeros((30, 4, 4), np.uint8))): "data: image size must be 8 to",
        str(npz(tmp_path / "nan.npz", train_images=np.full((30, 8, 8), np.nan))): "hold finite pixels",
        str(npz(tmp_path / "gap.npz", train_labels=np.zeros(30, int))): "every class must have a training image",
        str(npz(tmp_path / "range.npz", test_labels=np.full(12, -3))): "test_labels must lie in [0, 1000)",
    }
    for source, words in cases.items():
        line = refused(capsys, "--data", source, "--out", out)
        assert line.startswith("kr-fast: data: ")
        assert words in line
        assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0"], "run: temperature must be in [0.01, 1000], got 0.0"),
        (["--teacher-epochs", "-1"], "run: teacher_epochs must be in [1, 1000000], got -1"),
        (["--generator-objective", "gan"], "run: generator_objective must be one of flow, epsilon, v_prediction, got"),
        (["--confidence", "1"], "run: confidence must be in [0, 1), got 1.0"),
        (["--hard-weight", "-0.5"], "run: hard_weight must be in [0, 1000], got -0.5"),
        (["--num-shadows", "5"], "run: num_shadows must be 0, or even and at least 4, got 5"),
        (
            ["--student-shadows", "5"],
            "run: student_shadows must be 0, -1, or even and from 4 to num_shadows, 4, got 5",
        ),
        (["--student-shadows", "2"], "and from 4 to num_shadows, 4, got 2"),
        (["--num-shadows", "8", "--student-shadows", "10"], "and from 4 to num_shadows, 8, got 10"),
        (
            ["--num-shadows", "0", "--student-shadows", "4"],
            "run: student_shadows must be 0 or -1 without an audit (num_shadows 0), got 4",
        ),
        (["--audit-generator", "own"], "run: audit_generator must be one of shared, retrained, got own"),
        (["--generator-widths"], "run: generator_widths must hold channel counts above 0, got []"),
        (
            ["--checkpoints", "99"],
            "run: checkpoints must be at most 6, the steps in the second half of generator_steps, got 99",
        ),
        (["--teacher-arch", "vgg"], "must be one of"),
        (["--teacher", "no.such.module:make"], "run: teacher must name an importable pkg.mod:factory"),
        (
            ["--teacher", "absent.safetensors"],
            "run: teacher must be pkg.mod:factory, a file or the folder of a run, got",
        ),
        (["--preset", "huge"], "preset must be one of digits, small, private, accurate, guaranteed, toy, or several"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_choices_leave_nothing(tmp_path, capsys, flags, words):
    assert words in refused(capsys, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature: 3", "run: config must hold known keys only, got temprature"),
        ("temperature: hot", "run: temperature must be of type float, got 'hot'"),
        ("seed: 1.5", "run: seed must be of type int, got 1.5"),
        ("teacher_flip: 1", "run: teacher_flip must be of type bool, got 1"),
        ("generator_widths: 32", "run: generator_widths must be a list, got 32"),
        ("- 1", "run: config must be a YAML mapping"),
        ("a: [", "run: config must be a YAML file"),
    ],
)
def test_bad_config_file(tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert words in refused(capsys, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert not (tmp_path / "run").exists()


def test_teacher_of_another_class_count(tmp_path, capsys):
    from kr_fast.models import classifier
    from kr_fast.runtime.storage import files

    teacher = classifier("resnet8", num_classes=7, in_channels=1, width=4, image_size=8)
    files.save_tensors(tmp_path / "teacher.safetensors", teacher.state_dict())
    line = refused(capsys, "--teacher", tmp_path / "teacher.safetensors", "--out", tmp_path / "run")
    assert "must hold" in line
    assert "got [7" in line
    torch.save([1], tmp_path / "list.pt")
    assert "run: teacher must" in refused(capsys, "--teacher", tmp_path / "list.pt", "--out", tmp_path / "run")
    (tmp_path / "text.pt").write_text("x")
    assert "run: teacher must" in refused(capsys, "--teacher", tmp_path / "text.pt", "--out", tmp_path / "run")
    line = refused(capsys, "--teacher", "tests_teachers:seven", "--out", tmp_path / "run")
    assert "importable" in line
    assert not (tmp_path / "run").exists()


NET = """
import torch
class Answering(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.head, self.answer = torch.nn.Linear(64, 10), answer
    def forward(self, x):
        return self.answer(self.head(x.flatten(1)))
net = Answering
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, 7))",
            "run: teacher must return [N, 10] logits for 8 x 8 x 1 images, got [64, 7]",
        ),
        ("return torch.nn.Conv2d(in_channels, 10, 3)", "run: teacher must return [N, 10] logits"),
        ("return torch.nn.Linear(7, num_classes)", "run: teacher must return [N, 10] logits for 8 x 8 x 1 images"),
        ("return 3", "run: teacher must name a factory that returns a torch module, got an int"),
        ("return net(lambda z: z.softmax(1))", "run: teacher must return logits (remove its softmax), got rows that"),
        ("return net(lambda z: {'out': z})", "images, got a dict of out (return the logits alone)"),
        ("return net(lambda z: z.numpy())", "images, got a numpy array float32 [64, 10] (return the logits alone)"),
        ("return net(lambda z: z.no_such)", "images, got the error AttributeError: 'Tensor' object has no attribute"),
        ("return net(lambda z: z / 0)", "images that are finite, got NaN or inf"),
    ],
)
def test_factory_that_does_not_fit(tmp_path, capsys, monkeypatch, body, words):
    name = f"teacher_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"{NET}\ndef make(num_classes, in_channels):\n    {body}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)  # a factory beside the shell that names it
    assert words in refused(capsys, "--teacher", f"{name}:make", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_folders_are_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert "run: out must be empty or hold a run of kr-fast" in refused(capsys, "--out", tmp_path)
    assert "run: out must be a folder" in refused(capsys, "--out", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_options_become_the_configuration(tmp_path, monkeypatch):
    """Flags win over the file, the file over the preset, the preset over the defaults."""

    class Reached(BaseException):  # not an error, which the command would print
        pass

    def recycle(config):
        raise Reached(config)

    monkeypatch.setattr("kr_fast.recycling.pipeline.recycle", recycle)
    (tmp_path / "c.yaml").write_text("temperature: 2\nseed: 5\ngenerator_widths: [4, 8]\n")
    arguments = ["run", "--preset", "toy", "--config", str(tmp_path / "c.yaml"), "--seed", "7", "--teacher-flip"]
    with pytest.raises(Reached) as reached:
        main([*arguments, "--tune-confidence"])
    (config,) = reached.value.args
    assert (config.temperature, config.seed, config.generator_widths) == (2.0, 7, (4, 8))
    assert config.teacher_flip is True
    assert config.tune_confidence == ()
    assert config.teacher_arch == "resnet8"
    assert config.soft_weight == kr_fast.RecycleConfig().soft_weight


def test_presets_are_valid():
    from kr_fast.cli import options
    from kr_fast.recycling.presets import PRESETS, preset

    for name, values in PRESETS.items():
        assert options.build(kr_fast.RecycleConfig, values, where="run").out == f"runs/{name}"
    both = preset("small, private")
    assert both == {**PRESETS["small"], **PRESETS["private"]}  # whose Teacher is augmented as the Student already
    assert (both["generator_steps"], both["labels"]) == (800, "top1")
    config = kr_fast.RecycleConfig(**preset("private"))
    assert config.recipe("teacher").augment == config.recipe("student").augment


def test_info_names_every_op_and_backend(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    ops = "attack_r best_threshold bootstrap_auc model_batch_norm model_conv2d model_conv2d_backward roc rmia lira"
    ops += " model_residual_block model_sgd group_norm_silu qkv_attention winograd_conv2d distillation_loss encode_png"
    ops += " distillation_metrics membership_signals pack_uint8 philox_normal solver_step solver_step_at winograd_pack"
    ops += " winograd_conv2d_grad_weight batch_norm_act optimizer_step direct_conv2d"
    ops += " residual_block preactivation_block conv2d_grad_norms conv2d_grad_samples linear_grad_norms"
    ops += " linear_grad_samples embedding_grad_norms group_norm_grad_norms group_norm_grad_samples"
    ops += " layer_norm_grad_norms layer_norm_grad_samples"
    assert set(facts["ops"]) == set(ops.split())
    for cells in facts["ops"].values():
        assert cells["reference"] == "available"
        assert set(cells) <= {"reference", "cpu", "cuda", "triton"}
        if not torch.cuda.is_available():
            assert "available" not in {cells.get("cuda"), cells.get("triton")}
    assert main(["info"]) == 0
    assert "distillation_loss" in capsys.readouterr().out


def test_help_and_version(capsys):
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert f"kr-fast {kr_fast.__version__}" in capsys.readouterr().out
    for arguments in ([], ["walk"], ["run", "--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "kr_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"kr-fast {kr_fast.__version__}"


def test_table_without_an_audit():
    metrics = {
        "teacher": {"test_accuracy": 0.9},
        "student": {"test_accuracy": 0.85},
        "cas_gap": 0.05,
        "audit": None,
        "aop": None,
        "stages": {"teacher": 1.0},
        "config": {},
    }
    assert "LiRA" not in run.table(metrics)
    assert "0.9000" in run.table(metrics)


def test_an_unknown_backend_is_one_line(monkeypatch):
    monkeypatch.setenv("KR_FAST_BACKEND", "bogus")
    done = subprocess.run([sys.executable, "-m", "kr_fast", "info"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "kr-fast: KR_FAST_BACKEND must be one of reference, cpu, cuda, triton, got bogus\n"
    code = "import torch, kr_fast; kr_fast.pack_uint8(torch.zeros(1, 1, 2, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: KR_FAST_BACKEND must be one of" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda can run")
def test_a_backend_that_cannot_run_keeps_its_reason(capsys, tmp_path):
    with registry.forced("cuda"):
        assert main(["run", "--preset", "toy", "--out", str(tmp_path / "run")]) == 2
    assert "KR_FAST_BACKEND=cuda cannot run this call: " in capsys.readouterr().err.splitlines()[-1]
