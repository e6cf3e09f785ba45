"""Journals, run folders, seeds and progress bars."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
import torch

from kr_fast.runtime import progress, seeds, state
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import manifest
from kr_fast.runtime.storage.journal import Journal

CONFIG = {"seed": 0, "widths": [32, 64], "data": "digits"}

pytestmark = pytest.mark.usefixtures("released_run")


def test_journal_outlives_the_process(tmp_path):
    journal = Journal(tmp_path)
    assert journal.done("teacher") is None
    journal.finish("teacher", 1.5, {"val_accuracy": 0.5})
    journal.finish("generator", 2.0, {})
    again = Journal(tmp_path)
    assert again.done("teacher") == {"val_accuracy": 0.5}
    assert again.done("generator") == {}  # finished with nothing to say, and not "unfinished"
    assert list(again.seconds().items()) == [("teacher", 1.5), ("generator", 2.0)]


def test_run_folder_belongs_to_one_configuration(tmp_path):
    out = tmp_path / "a" / "run"
    manifest.open_run(out, CONFIG)
    manifest.release()
    manifest.open_run(out, CONFIG)
    manifest.release()
    manifest.open_run(out, {**CONFIG, "seed": 5})  # nothing was made by the other one
    manifest.release()
    manifest.open_run(out, CONFIG)
    manifest.release()
    (out / "private" / "teacher.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"run: seed must equal 0 of the run in .*, got 1; choose another --out"):
        manifest.open_run(out, {**CONFIG, "seed": 1})
    with pytest.raises(
        UserError,
        match=r"config.yaml must hold the options of this version of kr-fast, got no new; choose another --out",
    ):
        manifest.open_run(out, {**CONFIG, "new": 3})


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="run: out must be a folder"):
        manifest.open_run(tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="run: out must be empty or hold a run of kr-fast"):
        manifest.open_run(tmp_path, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.node.123.kr_fast.tmp").write_text("seed:")
    manifest.open_run(tmp_path, CONFIG)


def test_folder_in_use_is_refused(tmp_path):
    manifest.open_run(tmp_path, CONFIG)
    code = f"from kr_fast.runtime.storage import manifest; manifest.open_run({str(tmp_path)!r}, {CONFIG!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "run: out must not be in use by another process" in done.stderr
    manifest.release()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_begins_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    """As on Lustre mounted without ``flock``."""

    def refuse(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    manifest.open_run(tmp_path / "run", {"seed": 0})
    manifest.release()
    assert "run: no file locks in this folder ([Errno 38]" in caplog.text
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error: .*run/.lock"):
        manifest.open_run(tmp_path / "run", {"seed": 0})


def test_seeds_are_functions_of_their_names():
    assert seeds.derive(0, "a", 1) == seeds.derive(0, "a", 1)
    assert len({seeds.derive(s, n) for s in range(20) for n in ("a", "b", 1)}) == 60
    assert 0 <= seeds.derive(2**63, "x") < 2**63
    # The published digest of "0": what a run drew yesterday, on another machine, it draws today.
    assert seeds.derive(0) == int.from_bytes(bytes.fromhex("5feceb66ffc86f38"), "little") >> 1
    draws = [torch.rand(3, generator=seeds.generator(4, "fit", 2)) for _ in range(2)]
    assert torch.equal(*draws)


def test_errors_name_argument_rule_and_value():
    with pytest.raises(UserError, match=r"^op: temperature must be above 0, got -1$"):
        fail("op", "temperature", "be above 0", -1)
    assert issubclass(UserError, ValueError)


def test_progress_can_be_turned_off(monkeypatch, capfd):
    for value, shown in (("1", True), ("0", False)):
        monkeypatch.setitem(os.environ, "KR_FAST_PROGRESS", value)
        with progress.bar(2, "teacher", "epoch") as bar:
            bar.set(loss=0.5)
            bar.update(2)
        assert ("teacher" in capfd.readouterr().err) == shown
    with progress.bar(2, None) as bar:  # a bar that nobody asked for
        bar.update()
    assert capfd.readouterr().err == ""


def test_values_are_heard_of_bars_with_a_name_only(monkeypatch):
    monkeypatch.setitem(os.environ, "KR_FAST_PROGRESS", "0")
    heard = []
    with progress.listening(lambda *values: heard.append(values)):
        for name in ("teacher", None):
            with progress.bar(4, name, "epoch", 1) as bar:
                bar.update()
                bar.set(loss=0.5)
                bar.at(4)
                bar.set(loss=0.25)
    with progress.bar(1, "teacher", "epoch") as bar:
        bar.set(loss=1.0)
    assert heard == [("teacher", "epoch", 2, {"loss": 0.5}), ("teacher", "epoch", 4, {"loss": 0.25})]


def test_one_process_is_rank_zero():
    runtime = state.current()
    assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert list(runtime.shard(5)) == [0, 1, 2, 3, 4]
    assert runtime.broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(RuntimeError, match="lost"), runtime.main_first() as main:
        assert main
        raise RuntimeError("lost")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_cover_everything_once(world):
    parts = [state.Runtime(rank, world, torch.device("cpu"), "no").shard(10) for rank in range(world)]
    assert sorted(index for part in parts for index in part) == list(range(10))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("run: x must be y, got z"), UserError),
        (OSError(28, "full"), UserError),
        (KeyError("ours"), RuntimeError),
    ],
)
def test_other_ranks_fail_in_the_kind_of_rank_0(error, kind):
    """What a user can correct is one line on every rank; a mistake of ours keeps its traceback."""
    told = []

    class Rank(state.Runtime):
        def broadcast(self, value):
            told.append(value)
            return told[0]

    main, other = (Rank(rank, 2, torch.device("cpu"), "no") for rank in (0, 1))
    with pytest.raises(type(error)), main.main_first() as first:
        assert first
        raise error
    with pytest.raises(kind, match="^rank 0 failed: "), other.main_first() as first:
        assert not first
