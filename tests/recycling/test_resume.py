"""A run that is killed, or that meets a full disk, goes on to the same figures; a finished one is not done again."""

import signal

import pytest
from toy_runs import WHOLE_AUDIT, metrics, toy, without_seconds

pytestmark = pytest.mark.pipeline
# Python that kills the process once the function ``write`` of the package's files has done its work ``when``.
KILL = """
import os, signal
from kr_fast.runtime.storage import files
write = files.{write}
def write_and_die(path, *rest):
    write(path, *rest)
    if {when}: os.kill(os.getpid(), signal.SIGKILL)
files.{write} = write_and_die
"""
EARLIER = "from kr_fast.recycling.stages.generation import generator\ngenerator.SAVE_EVERY = 5\n"
INSTEAD = "import os, signal\n{import_}\n{function} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"


def after(write, when):
    return KILL.format(write=write, when=when)


def instead(import_, function):
    return INSTEAD.format(import_=import_, function=function)


# Runs die at these points one after the other, each after something was saved and before its stage was finished.
TEACHER = {
    "teacher, between epochs": after("save_state", 'path.name == "teacher.pt"'),
}
STAGES = {
    "generator, after a checkpoint": after("save_state", 'path.name == "generator.pt"'),
    "generator, while a checkpoint is written": instead("from diffusers import UNet2DModel", "UNet2DModel.save_config"),
    # Two trials of checkpoints, then one of tuning's own.
    "tuning, after the first trial": after("write_json", 'path.name == "trials.json" and len(rest[0]) == 3'),
    "gkd, after a period": after("save_state", 'path.name == "student.pt"'),
    "gkd, while a set is kept for shadow Students": after("save_array", 'path.name == "period-0002.labels.npy"'),
    "shadows, after a model": after("save_tensors", 'path.parent.name == "shadows"'),
    "shadow Students, after a model": after("save_tensors", 'path.parent.name == "shadow_students"'),
    "shadow Students, between the periods of the second model": after(
        "save_state", 'path.name == "shadow-student-001.pt"'
    ),
    "report": instead("from kr_fast.report import document", "document.write_markdown"),
}
WHOLE = {
    "ablation, between the periods of the second Student": after(
        "save_state", 'path.name == "model-class-regenerated.pt"'
    ),
    "after a generator's errors": after("save_array", 'path.name == "denoising-001.npy"'),
    "while a generator is retrained": EARLIER + after("save_state", 'path.name == "shadow-generator-002.pt"'),
    "while the control trains": after("save_state", 'path.name == "control.pt"'),
}


@pytest.mark.parametrize(
    ("points", "flags"),
    [(TEACHER, ["--teacher-epochs", "12", "--num-shadows", "0"]), (STAGES, []), (WHOLE, WHOLE_AUDIT)],
    ids=["teacher", "stages", "whole audit"],
)
def test_killed_run_continues_to_the_same_figures(tmp_path, finished, audited, points, flags):
    expected = (audited if points is WHOLE else finished)[0]
    if points is TEACHER:
        expected = tmp_path / "whole"
        toy(expected, *flags)
    for point, before in points.items():
        toy(tmp_path / "run", *flags, before=before, check=-signal.SIGKILL)
        assert not (tmp_path / "run" / "release" / "metrics.json").exists() or point == "report", point
    toy(tmp_path / "run", *flags)
    assert without_seconds(metrics(tmp_path / "run")) == without_seconds(metrics(expected))
    leftovers = [path.name for path in (tmp_path / "run").rglob("*.pt")]
    assert leftovers == []
    assert [path.name for path in (tmp_path / "run" / "private" / "state").iterdir()] == ["trials.json"]


def test_full_disk_stays_resumable(tmp_path, finished):
    """Files may grow to 8 KiB only, as on a full disk: one line, exit code 2; with room the run goes on."""
    limit = """
import atexit, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # coverage is written last
"""
    done = toy(tmp_path / "run", "--quiet", before=limit, check=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "File too large" in lines[0]
    toy(tmp_path / "run")
    assert without_seconds(metrics(tmp_path / "run")) == without_seconds(metrics(finished[0]))


def test_full_disk_while_a_checkpoint_is_written(tmp_path):
    code = """
import errno
from diffusers import UNet2DModel
def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
UNet2DModel.save_config = full
"""
    done = toy(tmp_path / "run", before=code, check=2)
    place = tmp_path / "run" / "private" / "generator"
    assert done.stderr.strip().splitlines()[-1] == f"kr-fast: [Errno 28] No space left on device: '{place}/step-000009'"
    assert list(place.iterdir()) == []


def test_finished_run_prints_at_once(finished):
    out, screen = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert toy(out).stdout == screen
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_changed_configuration_is_refused(finished):
    done = toy(finished[0], "--temperature", "3", check=2)
    assert "run: temperature must equal 4.0 of the run in" in done.stderr
    assert "got 3.0; choose another --out" in done.stderr


def test_changed_data_are_refused(tmp_path):
    import numpy as np

    def write(seed):
        draw = np.random.default_rng(seed)
        result = {}
        for which in ("train", "val", "test"):
            result[f"{which}_images"] = draw.integers(0, 256, (40, 8, 8), dtype=np.uint8)
            result[f"{which}_labels"] = np.arange(40) % 2
        np.savez(tmp_path / "set.npz", **result)

    write(0)
    flags = ["--data", str(tmp_path / "set.npz"), "--num-shadows", "0"]
    toy(tmp_path / "run", *flags)
    write(1)
    assert "run: data must be those that the run in" in toy(tmp_path / "run", *flags, check=2).stderr
