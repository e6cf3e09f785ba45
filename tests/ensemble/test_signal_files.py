"""Signals in files: the same numbers as in memory, continued after a kill or a full disk, refused for another call."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kr_fast.ensemble import ModelArray
from kr_fast.ensemble.inference import runner
from kr_fast.ensemble.inference.program import Program
from kr_fast.models import classifier
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files


def array(seeds=(0, 1, 2), **options):
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(classifier("resnet8", num_classes=5, in_channels=1, width=4))
    return ModelArray(models, **{"chunk": 4, **options})


def data(count=30):
    images = torch.randint(0, 256, (count, 8, 8, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return images, torch.arange(count) % 5


OPTIONS = {"augment": "flip", "want": ("phi", "correct")}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """A write after every 8 images: 30 images are three and a rest."""
    monkeypatch.setattr(runner, "CHUNKS_TO_FILE", 4)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_files_hold_what_memory_holds(tmp_path):
    images, labels = data()
    want = array().signals(images, labels, **OPTIONS)
    result = array().signals(images, labels, path=tmp_path / "out", **OPTIONS)
    assert same(result, want)
    assert np.array_equal(np.load(tmp_path / "out" / "phi.npy"), want["phi"].numpy())
    record = files.read_json(tmp_path / "out" / "signals.json")
    assert record["chunk"] == 4
    assert record["queries"] == [[False, 0, 0, "replicate", None], [True, 0, 0, "replicate", None]]
    result["phi"].zero_()  # a copy on write: the file keeps its numbers
    assert same(array().signals(images, labels, path=tmp_path / "out", **OPTIONS), want)


@pytest.mark.parametrize("name", ["phi.npy", "signals.json", "journal.json"])
def test_damaged_files_are_one_line(tmp_path, name):
    images, labels = data()
    want = array().signals(images, labels, path=tmp_path, **OPTIONS)
    want = {key: value.clone() for key, value in want.items()}
    before = (tmp_path / name).read_bytes()
    for damage in (b"", b"garbage", b"[]", before[: len(before) // 2], None):
        (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
        if damage is None and name != "phi.npy":
            continue  # it begins anew
        with pytest.raises(UserError, match=name) as error:
            array().signals(images, labels, path=tmp_path, **OPTIONS)
        assert "\n" not in str(error.value)
    (tmp_path / name).write_bytes(before)
    assert same(array().signals(images, labels, path=tmp_path, **OPTIONS), want)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_full_disk_is_an_error_and_not_a_loss(tmp_path, monkeypatch, when):
    images, labels = data()
    want, calls, write = array().signals(images, labels, **OPTIONS), [], os.pwrite

    def full(handle, data, place):
        calls.append(place)
        if len(calls) == 4 * when:  # two queries of two signals in each stretch
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[: max(len(data) // 2, 1)], place)  # a short write is no error

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        array().signals(images, labels, path=tmp_path, **OPTIONS)
    monkeypatch.undo()
    assert same(array().signals(images, labels, path=tmp_path, **OPTIONS), want)


def test_disk_without_room_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    images, labels = data()
    with pytest.raises(OSError, match="No space left"):
        array().signals(images, labels, path=tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("*.npy"))
    monkeypatch.undo()
    array().signals(images, labels, path=tmp_path, **OPTIONS)


def test_finished_rows_are_not_computed_again(tmp_path, monkeypatch):
    images, labels = data()
    want, calls = array().signals(images, labels, **OPTIONS), []
    signals = Program.signals

    def dies(self, request, rows, out, done):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        return signals(self, request, rows, out, done)

    monkeypatch.setattr(Program, "signals", dies)
    with pytest.raises(KeyboardInterrupt):
        array().signals(images, labels, path=tmp_path, **OPTIONS)
    first, calls[:] = list(calls), []
    assert same(array().signals(images, labels, path=tmp_path, **OPTIONS), want)
    assert first[-1].stop == calls[0].start == 16


@pytest.mark.parametrize("what", ["images", "labels", "weights", "models", "queries", "want", "dtype", "chunk"])
def test_another_call_is_refused_by_name(tmp_path, what):
    images, labels = data()
    array().signals(images, labels, path=tmp_path, **OPTIONS)
    other, options = array(), dict(OPTIONS)
    if what == "images":
        images = images.clone()
        images[3, 0, 0, 0] ^= 1
    elif what == "labels":
        labels = labels.roll(1)
    elif what == "weights":
        other = array((0, 1, 3))
    elif what == "models":
        other = array((0, 1, 2, 3))
    elif what == "queries":
        options["augment"] = "none"
    elif what == "want":
        options["want"] = ("phi",)
    elif what == "dtype":
        other = array(dtype=torch.float64)
    else:
        other = array(chunk=5)
    with pytest.raises(UserError, match=f"ModelArray: path must have the {what} of the signals in it"):
        other.signals(images, labels, path=tmp_path, **options)


CHILD = """
import os, sys, torch
sys.path.insert(0, {here!r})
from test_signal_files import OPTIONS, array, data
from kr_fast.ensemble.inference import runner
from kr_fast.ensemble.signal_files import SignalFiles
runner.CHUNKS_TO_FILE = 4
write = SignalFiles.write
def slow(self, start, stop, values):
    write(self, start, stop, values)
    print(stop, flush=True)
    sys.stdin.readline()
SignalFiles.write = slow
array().signals(*data(), path={path!r}, **OPTIONS)
"""


def test_killed_process_is_continued(tmp_path):
    code = CHILD.format(here=os.path.dirname(__file__), path=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "8\n"
    images, labels = data()
    with pytest.raises(UserError, match="path must not be in use by another process"):
        array().signals(images, labels, path=tmp_path, **OPTIONS)
    child.kill()
    child.wait()
    assert files.read_json(tmp_path / "journal.json")["rows"]["result"]["rows"] == 8
    result = array().signals(images, labels, path=tmp_path, **OPTIONS)
    assert same(result, array().signals(images, labels, **OPTIONS))


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="path must be a folder"):
        array().signals(*data(), path=tmp_path / "x")
