"""Two processes: one run folder, written once, every shadow trained once."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy_runs import QUIET, context_of, metrics

from kr_fast.recycling.stages.distillation import gkd
from kr_fast.runtime.storage import files

pytestmark = pytest.mark.pipeline


def launch(*arguments):
    """Two ranks under ``torchrun``, which is what ``accelerate launch`` runs too (on a CPU it wants a host file)."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 -m kr_fast"
    command = [sys.executable, *launcher.split(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET, "OMP_NUM_THREADS": "1"})


def test_two_processes_do_the_run_of_one(tmp_path, finished):
    done = launch("run", "--preset", "toy", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1  # rank 0 alone prints
    result, alone = metrics(tmp_path / "run"), metrics(finished[0])
    assert list(result["stages"]) == list(alone["stages"])
    # The Teacher and the shadows are trained by one process each: the same bits as in a run of one process. The
    # generator's gradients are summed in another order, so what follows from it may differ.
    assert result["teacher"] == alone["teacher"]
    assert result["audit"]["teacher"] == alone["audit"]["teacher"]
    # So the weights are those of one process but for rounding, and so are the images that follow, and the Student.
    step = max(path.name for path in (finished[0] / "private" / "generator").iterdir())
    weights = [
        files.load_tensors(out / "private" / "generator" / step / "unet" / "diffusion_pytorch_model.safetensors")
        for out in (tmp_path / "run", finished[0])
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-3, msg=name)
    assert result["student"]["test_accuracy"] == pytest.approx(alone["student"]["test_accuracy"], abs=0.05)
    # And this process draws the bytes that two have drawn.
    run = context_of(tmp_path / "run")
    images = gkd.drawn(run, gkd.tuned_sampling(run), run.config.images)(run.config.periods - 1)[2]
    assert np.array_equal(images.numpy(), np.load(run.folder.images))
    for folder in ("shadows", "shadow_students"):
        assert len(list((tmp_path / "run" / "private" / folder).glob("*.safetensors"))) == 4
    assert result["audit"]["student_full"].keys() == alone["audit"]["student_full"].keys()


def test_bad_input_ends_both(tmp_path):
    """Rank 0 alone looks; the other ends with a line too, and not with a traceback of its own."""
    done = launch("run", "--preset", "toy", "--out", tmp_path / "run", "--student-shift", "8")
    assert done.returncode != 0
    words = "run: student_shift must be below the shorter side of the images, 8, got 8"
    assert f"kr-fast: {words}" in done.stderr
    assert "RuntimeError: rank 0 failed" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_of_two_processes_exports(tmp_path, finished):
    done = launch("export", finished[0], tmp_path / "out", "--format", "npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("load_student reads it") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # and nothing of a second writer
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["student", "synthetic"]
    done = launch("export", finished[0], tmp_path / "out")
    assert done.returncode != 0
    assert "kr-fast: export: OUT must be a new or an empty folder" in done.stderr
