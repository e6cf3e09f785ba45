"""Files are whole or absent: after an error in the middle, after a full disk, and read back as written."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from kr_fast.runtime.storage import files, manifest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"x" * 100_000),
    "json": lambda path: files.write_json(path, list(range(50_000))),
    "tensors": lambda path: files.save_tensors(path, {"w": torch.arange(50_000.0)}),
    "state": lambda path: files.save_state(path, {"w": torch.arange(50_000.0)}),
    "array": lambda path: files.save_array(path, np.arange(50_000.0)),
}


def write_on_a_full_disk(folder):
    """For each writer: the name of the error, or None. For a process of its own, whose files it keeps small.

    No file may grow beyond 4 KiB: the write fails in the middle, as on a full disk (EFBIG in place of ENOSPC).
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    errors = {}
    for kind, write in WRITERS.items():
        try:
            write(pathlib.Path(folder) / kind / "file")
            errors[kind] = None
        except OSError as error:
            errors[kind] = errno.errorcode[error.errno]
    print(json.dumps(errors))


def test_full_disk_leaves_what_was_there(tmp_path):
    """In a child: the limit would also cut this process's own log, wherever its output goes to a file."""
    for kind in WRITERS:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "file").write_bytes(b"old")
    code = f"from {pathlib.Path(__file__).stem} import write_on_a_full_disk; write_on_a_full_disk({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(WRITERS, "EFBIG")
    for kind in WRITERS:
        assert names(tmp_path / kind) == ["file"]
        assert (tmp_path / kind / "file").read_bytes() == b"old"


def test_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half"), files.atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half")
    assert names(tmp_path) == []


def test_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError, match="half"), files.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("a")
        raise RuntimeError("half")
    assert names(tmp_path) == []
    with files.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "sub" / "a").read_text() == "a"


def test_an_empty_folder_becomes_whole_by_any_name(tmp_path, monkeypatch):
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "here")
    for path in ("../link", "."):
        with files.atomic_folder(path) as temporary:
            (temporary / "a").write_text("a")
    assert names(tmp_path) == ["here", "link", "real"]
    assert names(tmp_path / "real") == names(tmp_path / "here") == ["a"]
    assert (tmp_path / "link").is_symlink()


def test_what_was_written_is_read_back(tmp_path):
    tensors = {"w": torch.randn(3, 4), "n": torch.tensor([2**62])}
    files.save_tensors(tmp_path / "t.safetensors", tensors, {"architecture": "resnet14"})
    result = files.load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(result[name], value) for name, value in tensors.items())
    # A view that is not contiguous, as channels_last weights are.
    files.save_tensors(tmp_path / "c.safetensors", {"w": torch.arange(6).view(2, 3).T})
    assert torch.equal(files.load_tensors(tmp_path / "c.safetensors")["w"], torch.arange(6).view(2, 3).T)
    files.save_state(tmp_path / "s.pt", {"step": 3, "nested": {"w": torch.ones(2)}})
    assert files.load_state(tmp_path / "s.pt")["step"] == 3
    assert files.load_state(tmp_path / "absent.pt") is None
    files.write_json(tmp_path / "j.json", {"a": [1, 2.5, None]})
    assert files.read_json(tmp_path / "j.json") == {"a": [1, 2.5, None]}
    files.write_text(tmp_path / "e", "abc")
    assert files.sha256(tmp_path / "e") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "j.json", {"a": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3).T, np.float32(3), np.zeros((0, 4), np.uint8), np.ones((2, 5), bool)[:, ::2]],
    ids=["transposed", "scalar", "empty", "strided"],
)
def test_array_reads_back_as_written(tmp_path, array):
    files.save_array(tmp_path / "a.npy", array)
    read = np.load(tmp_path / "a.npy")
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert np.array_equal(read, array)


def test_first_writer_wins(tmp_path):
    assert files.write_new(tmp_path / "m", b"first")
    assert not files.write_new(tmp_path / "m", b"second")
    assert (tmp_path / "m").read_bytes() == b"first"
    assert names(tmp_path) == ["m"]


def test_first_writer_wins_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "link", no_links)
    assert files.write_new(tmp_path / "m", b"first")
    assert not files.write_new(tmp_path / "m", b"second")
    assert (tmp_path / "m").read_bytes() == b"first"


def test_only_our_own_leftovers_of_dead_writers_are_removed(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    node, dead = os.uname().nodename.split(".")[0], child.stdout.strip()
    keep = f".a.npy.elsewhere.{dead}.kr_fast.tmp .a.npy.{node}.1.kr_fast.tmp a.npy .draft.tmp .x.{node}.{dead}.tmp"
    keep += f" .a.{node}.12x.kr_fast.tmp .{node}.{dead}.kr_fast.tmp a.{node}.{dead}.kr_fast.tmp .kr_fast.tmp"
    keep = keep.split()
    # A process of before may have had our number.
    ours = [f".a.npy.{node}.{dead}.kr_fast.tmp", f".b.{node}.{os.getpid()}.kr_fast.tmp"]
    for name in (*keep, *ours):
        (tmp_path / name).touch()
    thesis = tmp_path / "notes" / f".draft.{node}.{dead}.kr_fast.tmp" / "thesis.txt"
    folder, precious = tmp_path / f".step.{node}.{dead}.kr_fast.tmp" / "unet", tmp_path / "precious" / "x"
    for path in (folder / "weights", thesis, tmp_path / ".draft.tmp.d" / "thesis.txt", precious):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    link = tmp_path / f".link.{node}.{dead}.kr_fast.tmp"
    link.symlink_to(tmp_path / "precious")
    with files.atomic_path(tmp_path / "now") as temporary:
        temporary.touch()
        files.remove_leftovers(tmp_path)
        assert temporary.exists()
    assert names(tmp_path) == sorted([*keep, "now", "notes", ".draft.tmp.d", "precious"])
    assert thesis.read_text() == "mine"
    assert precious.exists()


def test_a_scratch_folder_is_of_one_process_and_leaves_nothing(tmp_path):
    node = os.uname().nodename.split(".")[0]
    killed = tmp_path / f".other.{node}.{os.getpid()}.kr_fast.tmp"
    working = tmp_path / f".run.{node}.{os.getppid()}.kr_fast.tmp"
    for folder in (killed, working):
        (folder / "set").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), files.scratch_folder(tmp_path / "run") as own:
        assert not killed.exists()  # of a process of before that had our number
        (own / "set").mkdir(parents=True)
        files.remove_leftovers(tmp_path)
        assert own.exists()
        raise KeyboardInterrupt
    assert names(tmp_path) == [working.name]


def test_a_run_leaves_the_users_files_alone(tmp_path):
    out, config = tmp_path / "run", {"seed": 0}
    manifest.open_run(out, config)
    manifest.release()
    theirs = [out / "notes" / ".draft.tmp" / "thesis.txt", out / ".a.tmp", out / "private" / ".b.tmp"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    manifest.open_run(out, config)
    manifest.release()
    assert all(path.read_text() == "mine" for path in theirs)
