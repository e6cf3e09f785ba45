"""``kr-fast export``: what others open holds what the run holds, and refusals leave nothing behind."""

import dataclasses
import io
import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import context_of, metrics

import kr_fast
from kr_fast.cli import main
from kr_fast.data import to_float
from kr_fast.recycling.exporting import synthetic_set, teacher_answers
from kr_fast.recycling.exporting.finished_run import open_run
from kr_fast.recycling.exporting.job import export_run
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_progress", "one_thread")]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run as a Hugging Face data set."""
    return export_run(finished[0], tmp_path_factory.mktemp("export") / "new" / "out")


def released(run):
    return (np.load(run / "release" / "synthetic" / f"{name}.npy") for name in ("images", "labels"))


def soft_labels(run):
    """The Teacher's probabilities at the run's temperature, 4, in float64."""
    context, images = context_of(run), next(released(run))
    with torch.no_grad():
        logits = teacher.load(context).double()(to_float(torch.from_numpy(images)).double())
    assert context.config.temperature == 4
    return (logits / 4).softmax(1).numpy()


def test_students_of_run_and_export_answer_as_the_runs(finished, exported):
    context, (images, _) = context_of(finished[0]), released(finished[0])
    with torch.no_grad():
        expected = gkd.load(context)(to_float(torch.from_numpy(images))).numpy()
    for folder in (finished[0], exported.student, exported.student.parent):
        student = kr_fast.load_student(folder)
        assert np.abs(student.logits(images) - expected).max() <= 1e-6
        assert student.class_names == context.data.class_names
    for name in ("config.json", "model.safetensors", "README.md"):  # of the same figures
        assert (exported.student / name).read_bytes() == (finished[0] / "release" / "student" / name).read_bytes()


def test_model_card_holds_figures_audit_and_verdict(finished, exported):
    card, result = (exported.student / "README.md").read_text(), metrics(finished[0])
    assert card.startswith("---\nlibrary_name: kr-fast\npipeline_tag: image-classification\n")
    assert f"value: {result['student']['test_accuracy']}\n" in card
    decision = result["verdict"]["decision"]
    assert f"**Verdict: {decision[0].upper()}{decision[1:]}**" in card
    for reason in result["verdict"]["reasons"]:
        assert f"- {reason}\n" in card
    auc = result["audit"]["student_full"]["lira"]["auc"]
    assert f"{auc:.3f} [" in next(line for line in card.splitlines() if "LiRA online AUC, this one" in line)
    assert "empirical" in card
    assert "not differentially private" in card


def test_huggingface_opens_images_classes_and_soft_labels(finished, exported, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(str(exported.synthetic), split="train", cache_dir=str(tmp_path))
    assert isinstance(data.features["image"], datasets.Image)
    assert data.features["label"].names == [str(digit) for digit in range(10)]
    assert (data.features["soft_label"].feature.dtype, data.features["soft_label"].length) == ("float32", 10)
    images, labels = released(finished[0])
    assert data["label"][:] == labels.tolist()
    assert np.array_equal(np.stack([np.asarray(image) for image in data["image"]]), images[..., 0])
    assert np.abs(np.array(data["soft_label"][:]) - soft_labels(finished[0])).max() <= 1e-6


def test_webdataset(finished, tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(synthetic_set, "SHARD_BYTES", 100 * 64)  # two files, of 100 images and of 28
    facts = export_run(finished[0], tmp_path / "out", format="webdataset").images
    names = [f"data/train-0000{number}-of-00002.tar" for number in range(2)]
    assert [each["path"] for each in facts["files"]] == names
    paths = [str(tmp_path / "out" / "synthetic" / name) for name in names]
    rows = list(webdataset.WebDataset(paths, shardshuffle=False))
    images, labels = released(finished[0])
    assert [row["__key__"] for row in rows] == [f"{at:012d}" for at in range(128)]
    assert [int(row["cls"]) for row in rows] == labels.tolist()
    decoded = [np.asarray(Image.open(io.BytesIO(row["png"]))) for row in rows]
    assert np.array_equal(np.stack(decoded), images[..., 0])
    soft = np.stack([np.load(io.BytesIO(row["soft_label.npy"])) for row in rows])
    assert np.abs(soft - soft_labels(finished[0])).max() <= 1e-6


def test_npz_is_read_as_ready_images(finished, tmp_path):
    from kr_fast.data.npz import read_labelled

    export_run(finished[0], tmp_path / "out", format="npz")
    path = tmp_path / "out" / "synthetic" / "train.npz"
    for result, expected in zip(read_labelled(path, "run", "generator"), released(finished[0]), strict=True):
        assert np.array_equal(result, expected)
    assert np.abs(np.load(path)["soft_labels"] - soft_labels(finished[0])).max() <= 1e-6


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_croissant_is_valid(finished, exported, tmp_path, format):
    croissant = pytest.importorskip("mlcroissant")
    folder = exported.synthetic
    if format != "parquet":
        folder = export_run(finished[0], tmp_path / "out", format=format).synthetic
    described = json.loads((folder / "croissant.json").read_text())
    for each in described["distribution"]:
        assert files.sha256(folder / each["contentUrl"]) == each["sha256"]
    data = croissant.Dataset(jsonld=folder / "croissant.json")
    assert not data.metadata.issues.errors
    if format == "parquet":
        name = "train-00000-of-00001"
        row = next(iter(data.records(name)))
        images, labels = released(finished[0])
        assert np.array_equal(np.asarray(row[f"{name}/image"]), images[0, ..., 0])
        assert row[f"{name}/label"] == labels[0]
        assert np.abs(np.array(row[f"{name}/soft_label"]) - soft_labels(finished[0])[0]).max() <= 1e-6


def with_labels(run, **options):
    """The run as if it had been made with other options of the soft labels."""
    facts = open_run(run)
    return dataclasses.replace(facts, metrics={**facts.metrics, "config": {**facts.config, **options}})


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_run_of_top_classes_gives_no_probabilities(finished, tmp_path, format):
    """Its Student was taught no more than these, and that is what its audit measured."""
    run = with_labels(finished[0], labels="top1")
    facts = synthetic_set.write(tmp_path / "set", run, format)
    expected = soft_labels(finished[0]).argmax(1).tolist()
    path = tmp_path / "set" / facts["files"][0]["path"]
    if format == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        assert table.column_names == ["image", "label", "id", "teacher_label"]
        assert table["teacher_label"].to_pylist() == expected
    else:
        rows = list(pytest.importorskip("webdataset").WebDataset(str(path), shardshuffle=False))
        assert sorted(key for key in rows[0] if not key.startswith("__")) == ["cls", "png", "teacher_label.cls"]
        assert [int(row["teacher_label.cls"]) for row in rows] == expected
    assert "the set holds no probabilities" in (tmp_path / "set" / "README.md").read_text()


def test_a_run_of_class_labels_and_one_of_standardised_logits(finished):
    images = torch.from_numpy(next(released(finished[0])))
    assert teacher_answers.of_images(with_labels(finished[0], labels="class"), images) == {}
    (result,) = teacher_answers.of_images(with_labels(finished[0], standardize_logits=True), images).values()
    z = 4 * np.log(soft_labels(finished[0]))  # logits less a constant, which standardising removes
    z = (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) / 4
    assert np.abs(result.numpy() - np.exp(z) / np.exp(z).sum(1, keepdims=True)).max() <= 1e-6


def test_programs_answer_as_the_student(finished, tmp_path, capsys, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    caplog.set_level(logging.WARNING)
    code = main(["export", str(finished[0]), str(tmp_path / "out"), "--format", "npz", "--onnx", "--torch-export"])
    assert code == 0
    assert f"{tmp_path}/out/student: kr_fast.load_student reads it" in capsys.readouterr().out
    student = kr_fast.load_student(tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "student" / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "student" / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["image_shape"] == "[8, 8, 1]"
    images, _ = released(finished[0])
    for count in (1, 5):  # both dynamic
        expected = student.predict(images[:count]), student.logits(images[:count])
        for result in (session.run(None, {"images": images[:count]}), program(torch.from_numpy(images[:count]))):
            for got, value in zip(result, expected, strict=True):
                assert np.abs(np.asarray(got) - value).max() <= 1e-4
    for path in (tmp_path / "out" / "student").iterdir():  # torch notes the lines of code that it traced
        assert b"kr_fast/models" not in path.read_bytes(), path
        assert b"site-packages" not in path.read_bytes(), path


def test_refusals_write_nothing(finished, tmp_path):
    run, full = finished[0], tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for out, words in (
        (full, "OUT must be a new or an empty folder, got .* with mine"),
        (full / "mine", "OUT must be a folder, got"),
        (full / "mine" / "below", "OUT must be a folder, got .*/below, but .*/mine is a file"),
        (run / "private" / "out", "OUT must lie outside the run, or in .*/release: the rest of a run must not leave"),
        (run, "OUT must lie outside the run"),
        (run.with_name("run.private-images") / "out", "OUT must lie outside the run"),
    ):
        with pytest.raises(UserError, match=f"export: {words}"):
            export_run(run, out)
    with pytest.raises(UserError, match="export: format must be one of parquet, webdataset, npz, got zip"):
        export_run(run, tmp_path / "new" / "out", format="zip")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine"]
    assert not (run / "private" / "out").exists()


def test_places_where_no_folder_can_be_put_are_refused(finished, tmp_path, monkeypatch):
    """Before the work: there a finished export could not be renamed."""
    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "volume"))
        with pytest.raises(
            UserError, match=r"export: OUT must be no mount point \(name a new folder in it\), got .*volume"
        ):
            export_run(finished[0], tmp_path / "volume")
    monkeypatch.setattr("os.access", lambda path, how: str(path) != str(tmp_path))
    for name in ("volume", "new"):
        with pytest.raises(
            UserError, match="export: OUT must lie in a folder that can be written to, got .*, but .* cannot$"
        ):
            export_run(finished[0], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_what_a_killed_export_left_is_removed(finished, tmp_path):
    left = tmp_path / f".out.{os.uname().nodename.split('.')[0]}.999999999.kr_fast.tmp" / "student"
    left.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    export_run(finished[0], tmp_path / "out", format="npz")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_refused(finished, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)

    def refused(words, run=copy):
        assert main(["export", str(run), str(tmp_path / "out"), "--format", "npz"]) == 2
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    refused("RUN must be the folder of a run of kr-fast, got", tmp_path)
    copy.rename(tmp_path / "seed-0")
    refused("which holds the runs seed-0", tmp_path)
    (tmp_path / "seed-0").rename(copy)
    figures = copy / "release" / "metrics.json"
    text = figures.read_text()
    figures.write_text(text.replace('"student"', '"x"'))
    refused(f"export: {figures} must be as the stage report left it, got")
    figures.write_text(text)
    student = copy / "release" / "student.safetensors"
    weights = student.read_bytes()
    student.write_bytes(weights[:-1])
    refused(f"export: {student} must be as the stage gkd left it, got")
    student.write_bytes(weights)
    journal = json.loads((copy / "journal.json").read_text())
    del journal["report"]["files"]["release/metrics.json"]  # as of a version without a figure
    (copy / "journal.json").write_text(json.dumps(journal))
    values = json.loads(text)
    del values["dataset"]["class_names"]
    figures.write_text(json.dumps(values))
    refused(f"export: {figures} must be of this version of kr-fast, got no class_names; make the run again")
    del journal["report"]
    (copy / "journal.json").write_text(json.dumps(journal))
    refused("RUN must be a finished run (the same kr-fast run command continues it), got")
    shutil.rmtree(copy / "private")
    refused("RUN must hold release/ and private/ (an older kr-fast wrote another layout")
