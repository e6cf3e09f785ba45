"""Data sets on disk: content, resume after anything, refusal of other folders, errors with their cause."""

import errno
import gc
import json
import os
import sys

import numpy as np
import pytest
import torch
from toy_sampler import Net, plan, sampler

import kr_fast
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis import pipeline
from kr_fast.synthesis.output.sinks import FORMATS

COUNT, SIZE = 100, 24  # shards of three micro-batches of 8; the last one has half a micro-batch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.01)


def make(out, made=None, **options):
    chosen = {"count": COUNT, "shard_size": SIZE} | options
    return kr_fast.synthesize(made or sampler(), plan(), out, **chosen)


def hashes(out):
    """SHA-256 by file, as on disk, which must be what the index says."""
    result = {path.name: files.sha256(path) for path in sorted(out.glob("shard-*"))}
    index = json.loads((out / "index.json").read_text())
    listed = {name: entry["sha256"] for shard in index["shards"] for name, entry in shard["files"].items()}
    assert result == listed
    return result


def visible(out):
    return sorted(path.name for path in out.iterdir() if path.name.startswith("shard-"))


def leftovers(out):
    return sorted(path.name for path in out.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process writes at once."""
    out = tmp_path_factory.mktemp("whole") / "data"
    os.environ["KR_FAST_PROGRESS"] = "0"
    done = make(out)
    assert (done.images, done.shards, done.written) == (COUNT, 5, COUNT)
    return hashes(out)


def test_content_is_the_sampler_s(tmp_path):
    make(tmp_path / "data")
    ids = torch.arange(COUNT)
    labels = plan().labels(ids)
    images = sampler()(ids, labels)
    for kind, want in (("images", images), ("labels", labels), ("ids", ids)):
        result = np.concatenate([np.load(path) for path in sorted((tmp_path / "data").glob(f"*.{kind}.npy"))])
        assert np.array_equal(result, want.numpy())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_whole_and_done_once(tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    made = sampler()
    first = make(tmp_path / "a", made, format=format)
    assert first.written == COUNT
    batches = made.batches
    assert make(tmp_path / "a", made, format=format).written == 0
    assert made.batches == batches  # nothing was sampled again
    make(tmp_path / "b", format=format, queue_size=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_ranks_in_any_order(tmp_path, whole, world, monkeypatch):
    """Each rank is stopped after its own share, so that the shares, and not the second pass, make the set."""

    class Through(Exception):
        pass

    for rank in reversed(range(world)):
        made = sampler()
        own = sum(len(range(k * SIZE, min((k + 1) * SIZE, COUNT))) > 0 for k in range(rank, 5, world))
        limit = sum(-(-len(range(k * SIZE, min((k + 1) * SIZE, COUNT))) // 8) for k in range(rank, 5, world))

        def stop(batches, limit=limit):
            if batches == limit:
                raise Through

        made.before = stop
        monkeypatch.setattr(state, "current", lambda rank=rank: state.Runtime(rank, world, torch.device("cpu"), "no"))
        before = len(visible(tmp_path / "data")) if rank < world - 1 else 0
        try:
            make(tmp_path / "data", made)
            assert rank == 0
        except Through:
            assert len(visible(tmp_path / "data")) == before + 3 * own
    assert hashes(tmp_path / "data") == whole


@pytest.mark.parametrize("at", range(13))
def test_an_interrupt_at_any_batch_is_made_good(tmp_path, whole, at):
    def stop(batches):
        if batches == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data", sampler(before=stop))
    assert leftovers(tmp_path) == []
    assert len(visible(tmp_path / "data")) == 3 * (at // 3)  # what was whole has been written
    assert make(tmp_path / "data").written == COUNT - SIZE * (at // 3)
    assert hashes(tmp_path / "data") == whole


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_is_given_up_says_nothing_of_its_own(tmp_path, format, monkeypatch):
    """zipfile and pyarrow write an index as they are freed; into a closed file that was a traceback on the terminal."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: heard.append(raised.exc_value))

    def stop(batches):
        if batches == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data", sampler(before=stop), format=format)
    gc.collect()
    assert heard == []
    assert leftovers(tmp_path) == []


def test_same_images_in_other_shards(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", shard_size=40)
    make(tmp_path / "c", count=None, ids=range(30, 90))
    result = [
        np.concatenate([np.load(path) for path in sorted((tmp_path / name).glob("*.images.npy"))]) for name in "abc"
    ]
    assert np.array_equal(result[0], result[1])
    assert np.array_equal(result[0][30:90], result[2])
    # Shards keep their numbers: ids 30 to 47 are the second half of shard 1.
    assert visible(tmp_path / "c")[0] == "shard-000001.ids.npy"
    assert np.load(tmp_path / "c" / "shard-000001.ids.npy").tolist() == list(range(30, 48))


@pytest.mark.parametrize("call", range(1, 22, 4))
def test_full_disk(tmp_path, whole, call, monkeypatch):
    """No space at one of the syncs: of a file, of the folder, of the journal. What is visible is whole."""
    calls, real = 0, os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > call + 3:  # the first three are the manifest's and the journal's
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"shard \d in .* could not be written: No space left on device") as caught:
        make(tmp_path / "data")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.setattr(os, "fsync", real)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "data" / "index.json").exists()
    for name in visible(tmp_path / "data"):
        assert files.sha256(tmp_path / "data" / name) == whole[name]
    make(tmp_path / "data")
    assert hashes(tmp_path / "data") == whole


def test_write_that_fails_in_the_middle(tmp_path, whole, monkeypatch):
    from kr_fast.synthesis.output import sinks

    real, calls = sinks.Output.write, 0

    def full(self, data):
        nonlocal calls
        calls += 1
        if calls == 17:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(sinks.Output, "write", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        make(tmp_path / "data")
    assert len(visible(tmp_path / "data")) % 3 == 0
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(sinks.Output, "write", real)
    make(tmp_path / "data")
    assert hashes(tmp_path / "data") == whole


class Failing:
    """A sink of one's own, whose third batch fails; with a queue of 1 the caller is then waiting for room."""

    suffixes = (".bin",)

    def describe(self):
        return {"version": 1}

    def writer(self, outputs, count, shape, classes):
        self.output, self.left = outputs[0], 2
        return self

    def write(self, ids, labels, images):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("three")
        self.output.write(images.numpy())

    def close(self):
        pass


def test_errors_of_the_writer_surface_with_their_cause(tmp_path):
    text = r"synthesize: shard 0 in .* could not be written: ZeroDivisionError\('three'\)"
    with pytest.raises(RuntimeError, match=text) as caught:
        make(tmp_path / "data", format=Failing(), queue_size=1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert visible(tmp_path / "data") == []


def test_files_that_are_absent_short_or_changed(tmp_path, whole):
    out = tmp_path / "data"
    make(out)
    names = visible(out)
    (out / names[0]).unlink()
    (out / names[4]).write_bytes(b"short")
    assert make(out).written == 2 * SIZE
    flipped = bytearray((out / names[7]).read_bytes())
    flipped[-1] ^= 1
    (out / names[7]).write_bytes(flipped)
    assert make(out).written == 0  # of the same length, so only its SHA-256 tells
    assert make(out, verify=True).written == SIZE
    assert hashes(out) == whole


def test_a_file_without_its_line_is_written_again(tmp_path, whole):
    out = tmp_path / "data"
    make(out)
    for path in (out / "journal").iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # cut off by a kill
    (out / "shard-000003.images.npy").write_bytes(b"nobody knows")
    assert make(out).written == COUNT - 2 * SIZE
    assert hashes(out) == whole


def test_leftovers_of_the_dead_are_removed(tmp_path):
    out = tmp_path / "data"
    make(out)
    (out / "shard-000001.ids.npy").unlink()
    node = os.uname().nodename.split(".")[0]
    (out / f".shard-000001.ids.npy.{node}.4194304.kr_fast.tmp").write_bytes(b"half")
    (out / ".shard-000001.ids.npy.elsewhere.7.kr_fast.tmp").write_bytes(b"half")
    make(out)
    assert leftovers(out) == []


def test_not_finite(tmp_path):
    class Broken(Net):
        def forward(self, x, t, class_labels=None):
            out = super().forward(x, t, class_labels)
            return torch.where((class_labels == 5)[:, None, None, None] & (t < 500), torch.nan, out)

    text = (
        r"Sampler: unet must return finite values, got NaN or inf for ids in \[\d+, \d+\], first at step 1 "
        r"\(shard 0, network SHA-256 [0-9a-f]{12}\)"
    )
    with pytest.raises(UserError, match=text):
        make(tmp_path / "data", sampler(net=Broken()))
    assert visible(tmp_path / "data") == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"made": lambda: sampler(seed=12)},
            "sampler.seed must equal 11 of the data set in .*, got 12; choose another",
        ),
        ({"made": lambda: sampler(micro_batch=4)}, "sampler.micro_batch must equal 8 of the data set in .*, got 4"),
        ({"made": lambda: sampler(net=Net(3, 9))}, "sampler.network must equal '[0-9a-f]{64}' of the data set"),
        ({"count": 99}, "count must equal 100 of the data set in .*, got 99"),
        ({"shard_size": 32}, "shard_size must equal 24 of the data set in .*, got 32"),
        ({"format": "npz"}, "format must equal 'npy' of the data set in .*, got 'npz'"),
        ({"plan": kr_fast.LabelPlan.balanced(7)}, "labels.pattern must equal '[0-9a-f]{64}' of the data set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_data_set_is_refused(tmp_path, changed, text):
    out = tmp_path / "data"
    make(out)
    before = hashes(out)
    made = changed.pop("made", sampler)()
    chosen = {"count": COUNT, "shard_size": SIZE, "plan": plan()} | changed
    with pytest.raises(UserError, match="synthesize: " + text):
        kr_fast.synthesize(made, chosen.pop("plan"), out, **chosen)
    assert hashes(out) == before


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="synthesize: out must be empty or hold a data set of kr-fast, got"):
        make(tmp_path)
    with pytest.raises(UserError, match="synthesize: out must be a folder, got"):
        make(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="synthesize: .*manifest.json must hold the manifest of a data set, got"):
        make(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["manifest.json"]


def test_a_start_that_failed_is_in_nobodys_way(tmp_path, whole):
    """No shard was finished: another network, or another seed, takes the folder over."""

    class Broken(Net):
        def forward(self, x, t, class_labels=None):
            return super().forward(x, t, class_labels) * float("nan")

    with pytest.raises(UserError, match="NaN or inf"):
        make(tmp_path, sampler(net=Broken()))
    with pytest.raises(UserError, match="NaN or inf"):
        make(tmp_path, sampler(net=Broken(), seed=12))
    make(tmp_path)
    assert hashes(tmp_path) == whole
    with pytest.raises(UserError, match="sampler.seed must equal 11 of the data set in"):
        make(tmp_path, sampler(seed=12))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": None}, "count must be given for a plan without an end, got None"),
        ({"ids": range(3)}, "count must be None where ids are given, got 100"),
        ({"count": 0}, r"ids must be a non-empty range of step 1 in \[0, 2\^63\), got range\(0, 0\)"),
        ({"count": None, "ids": range(0, 9, 3)}, "ids must be a non-empty range of step 1"),
        ({"count": None, "ids": range(-2, 9)}, "ids must be a non-empty range of step 1"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({"format": "zarr"}, "format must be one of npy, npz, webdataset, parquet, device, got zarr"),
        ({"format": "device"}, "out must be None for the format device, got"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, options, text):
    with pytest.raises(UserError, match="synthesize: " + text):
        make(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_more_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="synthesize: out must be a folder, got None"):
        make(None)
    with pytest.raises(UserError, match=r"ids must lie in \[0, 50\), the plan's ids, got range\(0, 51\)"):
        kr_fast.synthesize(sampler(), plan(50), tmp_path / "data", count=51)
    assert kr_fast.synthesize(sampler(), plan(50), tmp_path / "data").images == 50
    assert not (tmp_path / "data" / "shard-000001.ids.npy").exists()


def test_progress_shows_the_rate(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KR_FAST_PROGRESS", "1")
    make(tmp_path / "data")
    shown = capfd.readouterr().err
    assert "synthesize" in shown
    assert "100/100" in shown
    assert "img/s" in shown


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    net = Net().cuda()
    make(tmp_path / "a", sampler(net=net), queue_size=1)
    make(tmp_path / "b", sampler(net=net))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    ids = torch.arange(COUNT)
    result = np.concatenate([np.load(path) for path in sorted((tmp_path / "a").glob("*.images.npy"))])
    assert np.array_equal(result, sampler(net=net)(ids, plan().labels(ids)).cpu().numpy())
