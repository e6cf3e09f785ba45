"""The examples run as they stand, at toy size; those of a whole run are in tests/recycling/exporting/."""

import importlib.util
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

from kr_fast.models import classifier

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread", "no_progress")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """``run(name, *arguments)``: what the example prints."""
    monkeypatch.chdir(tmp_path)

    def printed(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return printed


def importable(name):
    """Whether the package is there and fits this torch: a torchvision built for another one fails as it is loaded."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


def test_every_example_is_listed():
    page = (EXAMPLES.parent / "docs" / "tasks" / "examples.md").read_text()
    listed = set(re.findall(r"\(\.\./\.\./examples/(\w+\.\w+)\)", page))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_file()}


def test_distillation_with_accelerate(run):
    shown = run("distill_accelerate.py", "--epochs", 4)
    assert all(float(each) > 0.6 for each in re.findall(r"(?:teacher|student): test accuracy (\S+)", shown)), shown
    assert shown.count("accuracy") == 2


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers, which has 84 MB")
def test_distillation_with_a_trainer(run):
    shown = run("distill_trainer.py", "--epochs", 2)
    assert re.findall(r"(teacher|student): test accuracy 0\.\d+", shown) == ["teacher", "student"]


def test_a_pipeline_is_sped_up(run):
    shown = run("speed_up_pipeline.py", "--count", 8, "--steps", 2)
    assert re.fullmatch(
        r"8 images \[16, 16, 1\], 2 steps: \S+ s by DDIMPipeline, \S+ s by kr_fast", shown.strip().splitlines()[-1]
    )


def test_a_classifier_of_torchvision_is_audited(run, monkeypatch, tmp_path):
    """Where torchvision cannot be imported, the same lines audit a small network in its place."""
    if not importable("torchvision"):
        network = lambda num_classes: classifier("resnet8", num_classes=num_classes, in_channels=3, width=4)  # noqa: E731
        models = types.SimpleNamespace(resnet18=network)
        monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    shown = run("audit_torchvision.py", "--images", 80, "--epochs", 1, "--shadows", 4, "--out", "audit")
    assert shown.splitlines()[0] in ("share", "do not share", "not decided")
    assert (tmp_path / "audit" / "release" / "audit.html").exists()


def test_a_synthetic_set_is_read(run):
    pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    shown = run("read_synthetic_set.py", "--count", 160)
    losses = re.findall(r"(datasets|WebDataset): 160 images, mean loss (\d\.\d+)", shown)
    assert [name for name, _ in losses] == ["datasets", "WebDataset"]
