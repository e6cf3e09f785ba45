"""Files of a finished run that are replaced, cut, lost or damaged: made again where that is quick, else named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from toy_runs import metrics

import kr_fast
from kr_fast.cli import main
from kr_fast.recycling import trained_generator
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.presets import preset
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files, manifest

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_progress", "released_run", "one_thread")]


def config(out, **changes):
    return RecycleConfig(**{**preset("toy"), "out": str(out), **changes})


@pytest.fixture(scope="module")
def small(finished, tmp_path_factory):
    """A copy of the finished run, which each test repairs again."""
    out = tmp_path_factory.mktemp("small") / "run"
    shutil.copytree(finished[0], out)
    return out


def negated(path):
    np.save(path, ~np.load(path))


def another(path):
    files.save_tensors(path, {name: value + 1 for name, value in files.load_tensors(path).items()})


CHANGES = {
    "private/teacher.safetensors": ("teacher", another),
    "private/generator/step-000012/unet/config.json": ("generator", lambda path: path.write_text("{")),
    "release/student.safetensors": ("gkd", lambda path: path.unlink()),
    "release/synthetic/images.npy": ("gkd", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    "private/shadows/keep.npy": ("shadows", negated),
    "private/shadows/model-001.safetensors": ("shadows", another),
    "private/shadow_students/shadows.json": ("shadow_students", lambda path: path.write_text("")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_were_changed_are_named(small, name):
    stage, change = CHANGES[name]
    path, before = small / name, {each: each.read_bytes() for each in small.rglob("*") if each.is_file()}
    change(path)
    with pytest.raises(UserError, match=rf"run: {path} must be as the stage {stage} left it, got .*; put it back, or"):
        kr_fast.recycle(config(small))
    path.write_bytes(before[path])
    assert {each: each.read_bytes() for each in small.rglob("*") if each.is_file()} == before


def test_pages_and_figures_are_made_again(small, capsys):
    before = metrics(small)
    for name in ("report.html", "metrics.json", "figures/roc.png"):
        path = small / "release" / name
        path.unlink() if name != "report.html" else path.write_text("edited")
        result = kr_fast.recycle(config(small))
        assert path.exists()
        assert "edited" not in result.report.read_text()[:10]
        assert result.metrics == before


def test_options_are_compared_before_the_data(small, tmp_path):
    with pytest.raises(UserError, match="run: seed must equal 0 of the run in .*, got 1; choose another --out"):
        kr_fast.recycle(config(small, seed=1, data=str(tmp_path / "absent.npz")))


@pytest.mark.parametrize("name", ["journal.json", "config.yaml"])
def test_damaged_text_is_one_line(small, tmp_path, name, capsys):
    path = small / name
    before = path.read_bytes()
    for damage in (b"", b"\xff\x00", b"[]", before[: len(before) // 2]):
        path.write_bytes(damage)
        manifest.release()
        capsys.readouterr()
        for command in (
            ["run", "--preset", "toy", "--out"],
            ["synthesize", "--count", "4", "--out", str(tmp_path / "set"), "--model"],
        ):
            assert main([*command, str(small)]) == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1
            assert str(path) in lines[0]
    path.write_bytes(before)


def test_generator_is_checked_where_it_is_used(small):
    path = small / "private" / "generator" / "step-000009" / "unet" / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    another(path)
    with pytest.raises(UserError, match=rf"synthesize: {path} must be as the stage generator left it"):
        trained_generator.open_generator(small, torch.device("cpu"), 9)
    trained_generator.open_generator(small, torch.device("cpu"), 12)
    path.write_bytes(before)


def test_data_may_be_named_by_another_path(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    sizes = {"train": 40, "val": 20, "test": 20}
    images = {f"{name}_images": draw.integers(0, 256, (count, 8, 8), np.uint8) for name, count in sizes.items()}
    labels = {f"{name}_labels": np.arange(count) % 2 for name, count in sizes.items()}
    np.savez(tmp_path / "set.npz", **images, **labels)
    shutil.copy(tmp_path / "set.npz", tmp_path / "copy.npz")
    np.savez(tmp_path / "other.npz", **{**images, "val_images": 255 - images["val_images"]}, **labels)
    monkeypatch.chdir(tmp_path)
    short = {"num_shadows": 0, "periods": 1, "teacher_epochs": 2, "tune_noise_scale": (), "tune_guidance_scale": ()}
    first = config("run", data="set.npz", **short)
    result = kr_fast.recycle(first)
    manifest.release()
    student = files.sha256("run/release/student.safetensors")
    for name in ("./set.npz", str(tmp_path / "set.npz"), "copy.npz"):
        again = kr_fast.recycle(dataclasses.replace(first, data=name))
        assert again.metrics == result.metrics
        assert manifest.read_config(tmp_path / "run" / "config.yaml")["data"] == name
    with pytest.raises(
        UserError, match=r"run: data must be those that the run in run was started with .* in other.npz"
    ):
        kr_fast.recycle(dataclasses.replace(first, data="other.npz"))
    # Two equal runs are equal files.
    kr_fast.recycle(dataclasses.replace(first, out="twin"))
    assert files.sha256("twin/release/student.safetensors") == student
    assert files.sha256("twin/private/teacher.safetensors") == files.sha256("run/private/teacher.safetensors")
    assert json.loads((tmp_path / "twin" / "journal.json").read_text())["gkd"]["files"]


def test_out_inside_the_images_is_refused(tmp_path):
    (tmp_path / "imgs" / "a").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(UserError, match="run: out must lie outside data, the folder"):
            kr_fast.recycle(config(tmp_path / "imgs" / "run", data=str(tmp_path / "imgs")))
    assert [path.name for path in (tmp_path / "imgs").iterdir()] == ["a"]
