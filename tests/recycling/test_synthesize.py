"""kr-fast synthesize from the folder of a run: its generator, its classes, its image size, sampled as it was tuned."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from toy_runs import QUIET, context_of

import kr_fast
from kr_fast.cli import main
from kr_fast.data import Split
from kr_fast.models import unet
from kr_fast.recycling import set_quality, trained_generator
from kr_fast.recycling.given import source
from kr_fast.recycling.given.interface import DataFacts
from kr_fast.recycling.stages import given_teacher, teacher
from kr_fast.recycling.stages.distillation import quality
from kr_fast.recycling.stages.generation.generator_loss import make_scheduler
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis.job import SynthesizeConfig, TrainedGenerator, prepare

pytestmark = pytest.mark.pipeline
FLAGS = ["--count", "70", "--shard-size", "32", "--seed", "3"]


def images(out, kind="images"):
    return np.concatenate([np.load(path) for path in sorted(out.glob(f"*.{kind}.npy"))])


def test_a_run_gives_more_images(tmp_path, finished, monkeypatch):
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    run, out = finished[0], tmp_path / "data"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["synthesize", "--model", str(run), "--out", str(out), *FLAGS]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    tuned = json.loads((run / "journal.json").read_text())["tuning"]["result"]["sampling"]
    used = yaml.safe_load((out / "config.yaml").read_text())
    assert {key: used[key] for key in ("num_inference_steps", "guidance_scale", "noise_scale", "checkpoint")} == {
        key: tuned[key] for key in ("num_inference_steps", "guidance_scale", "noise_scale", "checkpoint")
    }
    actual = trained_generator.open_generator(run, torch.device("cpu"))
    classes = len(actual.class_counts)
    sampler = kr_fast.Sampler(
        actual.network, actual.scheduler, seed=3, crop=(8, 8), num_classes=classes, **actual.sampling
    )
    ids = torch.arange(70)
    labels = kr_fast.LabelPlan.counts(actual.class_counts).labels(ids)
    assert images(out).shape == (70, 8, 8, 1)
    assert np.array_equal(images(out, "labels"), labels.numpy())
    assert np.array_equal(images(out), sampler(ids, labels).numpy())


def test_a_folder_of_several_seeds_is_no_run(tmp_path, capsys):
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "journal.json").write_text("{}")
    words = f"must be the folder of one run, got {tmp_path}, which holds the runs seed-0"
    assert main(["synthesize", "--model", str(tmp_path), "--out", str(tmp_path / "set"), "--count", "1"]) == 2
    assert f"synthesize: model {words}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"run: teacher {words}"):
        given_teacher.given_teacher(str(tmp_path), "resnet8", 4)
    facts = DataFacts(("a", "b"), (8, 8, 1), (0, 1))
    with pytest.raises(UserError, match=f"run: generator {words}"):
        source._opened((str(tmp_path),), facts, torch.device("cpu"), 4)


def test_diffusers_warns_of_nothing(monkeypatch):
    """Its models warn of the parts that should stay float32 where they are cast, and name none."""
    from diffusers.models import modeling_utils

    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning", said.append)
    sampling = {"num_inference_steps": 2, "guidance_scale": 1.0, "noise_scale": 1.0}
    parts = (unet(8, 8, 1, 2, widths=(8, 8)), make_scheduler("flow"), 1, (8, 8), (3, 4), "train", sampling)
    config = SynthesizeConfig(model="run", out="set", count=4, dtype="bfloat16")
    sampler, _, _ = prepare(config, TrainedGenerator(*parts))
    assert sampler.network.dtype == torch.bfloat16
    assert said == []


def test_a_set_is_measured_by_a_run(tmp_path, finished, monkeypatch, capsys):
    """Its images are drawn again: those of all ids, so that the figures are those of the files, to the last bit."""
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    run, out = finished[0], tmp_path / "data"
    assert main(["synthesize", "--model", str(run), "--out", str(out), *FLAGS, "--quality-run", str(run)]) == 0
    assert "FID (Frechet distance)" in capsys.readouterr().out
    result, context = json.loads((out / "quality.json").read_text()), context_of(run)
    generated = Split(*(torch.from_numpy(images(out, kind)) for kind in ("images", "labels")))
    expected = quality.compare(context, teacher.load(context), generated)
    assert result == {"class_names": [str(digit) for digit in range(10)], **expected}
    assert len(result["classes"]) == 10
    assert result["images"] == 70


def test_a_run_that_does_not_fit_the_set_is_refused(tmp_path, finished):
    from diffusers import DDIMScheduler

    def refused(run, channels=1, classes=10, count=20):
        network = unet(8, 8, channels, 11, widths=(8, 8)).eval()
        sampler = kr_fast.Sampler(network, DDIMScheduler(), 1, seed=0, micro_batch=1)
        with pytest.raises(UserError) as error:
            set_quality.opened(str(run), sampler, kr_fast.LabelPlan.balanced(classes), range(count))
        return str(error.value)

    run = finished[0]
    assert refused(tmp_path) == f"synthesize: quality_run must be the folder of a run, got {tmp_path}"
    assert refused(run, channels=3).startswith("synthesize: quality_run must be a run of images [8, 8, 3], as those of")
    assert refused(run, classes=11).startswith("synthesize: quality_run must be a run of at least 11 classes, as the")
    assert "quality_run must leave 6 images of the set, for training and for the test, got 5, 1" in refused(
        run, count=5
    )
    for name in ("config.yaml", "private/teacher.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "release").mkdir()
    entries = json.loads((run / "journal.json").read_text())
    (tmp_path / "journal.json").write_text(json.dumps({"data": entries["data"]}))
    assert "quality_run must be a run whose Teacher is trained, got" in refused(tmp_path)
    (tmp_path / "journal.json").write_text(json.dumps(entries))
    options = yaml.safe_load((run / "config.yaml").read_text())
    for change, words in (
        ({"data": "images in memory"}, "whose images can be read again"),
        ({"x": 1}, "of this version"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options | change))
        assert f"quality_run must be a run {words}" in refused(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    entries["data"]["result"]["sha256"] = 64 * "0"
    (tmp_path / "journal.json").write_text(json.dumps(entries))
    assert "data must be those that the run in" in refused(tmp_path)


def test_two_ranks_write_what_one_writes(tmp_path, finished):
    def command(out):
        return ["-m", "kr_fast", "synthesize", "--model", str(finished[0]), *FLAGS, "--out", str(out)]

    environment = {**__import__("os").environ, **QUIET}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for start in ([sys.executable, *command(tmp_path / "a")], [sys.executable, *launcher, *command(tmp_path / "b")]):
        done = subprocess.run(start, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("70 images in 3 shards") == 1  # rank 0 alone prints
    for name in ("manifest.json", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_runs_that_are_refused(tmp_path, finished):
    with pytest.raises(UserError, match="synthesize: checkpoint must be one of 9, 12, got 5"):
        trained_generator.open_generator(finished[0], torch.device("cpu"), 5)
    (tmp_path / "config.yaml").write_text((finished[0] / "config.yaml").read_text())
    (tmp_path / "journal.json").write_text("{}")
    with pytest.raises(UserError, match="synthesize: model must hold release/ and private/"):
        trained_generator.open_generator(tmp_path, torch.device("cpu"))
    (tmp_path / "private").mkdir()
    with pytest.raises(UserError, match="synthesize: model must be a run whose generator is trained, got"):
        trained_generator.open_generator(tmp_path, torch.device("cpu"))
    options = yaml.safe_load((finished[0] / "config.yaml").read_text())
    del options["solver"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(UserError, match=r"config.yaml must hold the options of a run, got no solver"):
        trained_generator.open_generator(tmp_path, torch.device("cpu"))


def test_a_run_of_an_earlier_version_is_a_generator(finished):
    path = finished[0] / "config.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump({key: value for key, value in yaml.safe_load(before).items() if key != "epsilon"}))
    trained_generator.open_generator(finished[0], torch.device("cpu"))
    path.write_text(before.rstrip("\n"))
    with pytest.raises(UserError, match="must hold options in YAML, got a file whose end is missing"):
        trained_generator.open_generator(finished[0], torch.device("cpu"))
    path.write_text(before)
