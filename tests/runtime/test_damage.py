"""Damaged files of ours: one line with the file's name, or a right continuation; nothing else is harmed."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import Journal, PartJournal, check_inside

CONFIG = {"data": "digits", "seed": 0, "widths": [32, 64], "z": 0.5}
VALUES = {"format": "npy", "count": 10, "sampler": {"seed": 0}}
DAMAGES = {
    "empty": lambda old: b"",
    "garbage": lambda old: b"\xff\x00\x9c{" + os.urandom(40),
    "list": lambda old: b"[]",
    "object": lambda old: b"{}",
    "half": lambda old: old[: len(old) // 2],
    "other values": lambda old: b'{"teacher": 3, "data": []}',
    "deep": lambda old: b"[" * 100_000,
}


@pytest.fixture(params=DAMAGES)
def damaged(request):
    """``damaged(path)`` damages the file."""
    return lambda path: path.write_bytes(DAMAGES[request.param](path.read_bytes()))


pytestmark = pytest.mark.usefixtures("released_run")


def told(path, call, *arguments):
    """Whether the call is refused in one line with the file's name."""
    actual = None
    try:
        call(*arguments)
    except UserError as error:
        actual = str(error)
    assert actual is None or (str(path) in actual and "\n" not in actual)
    return actual is not None


def a_run(out):
    """A folder with one finished stage."""
    manifest.open_run(out, CONFIG)
    (out / "private" / "teacher.safetensors").write_text("weights")
    journal = Journal(out)
    journal.finish("data", 0.5, {"sha256": "x"})
    journal.finish("teacher", 1.5, {"accuracy": 1.0}, [out / "private" / "teacher.safetensors"])
    manifest.release()
    return journal


def test_journal(tmp_path, damaged):
    path = a_run(tmp_path).path
    damaged(path)
    if not told(path, Journal, tmp_path):
        assert Journal(tmp_path).seconds() == {}  # the empty object: nothing is finished


def test_options_of_a_run(tmp_path, damaged):
    a_run(tmp_path)
    damaged(tmp_path / "config.yaml")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    whole = before[tmp_path / "config.yaml"].endswith(b"}")  # then one option is named
    assert told(tmp_path if whole else tmp_path / "config.yaml", manifest.open_run, tmp_path, CONFIG)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    manifest.release()
    (tmp_path / "private" / "teacher.safetensors").unlink()
    manifest.open_run(tmp_path, CONFIG)  # where nothing was made nothing is lost
    assert manifest.read_config(tmp_path / "config.yaml") == CONFIG
    assert Journal(tmp_path).seconds() == {}


def test_manifest_of_a_data_set(tmp_path, damaged):
    manifest.open_shared(tmp_path, VALUES, "synthesize").close()
    damaged(tmp_path / "manifest.json")
    before = (tmp_path / "manifest.json").read_bytes()
    assert told(tmp_path if before.endswith(b"}") else tmp_path / "manifest.json", open_set, tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def open_set(out, values=VALUES):
    manifest.open_shared(out, values, "synthesize").close()


def test_training_state_and_tensors(tmp_path, damaged):
    for name, save, load in (
        ("teacher.pt", lambda path: files.save_state(path, {"w": torch.ones(3)}), files.load_state),
        ("teacher.safetensors", lambda path: files.save_tensors(path, {"w": torch.ones(3)}), files.load_tensors),
        ("trials.json", lambda path: files.write_json(path, {"a": 1}), lambda path: files.read_json(path, dict)),
    ):
        save(tmp_path / name)
        damaged(tmp_path / name)
        if name != "trials.json" or (tmp_path / name).read_bytes()[:1] != b"{":
            assert told(tmp_path / name, load, tmp_path / name), name


def test_every_bit_of_a_training_state_counts(tmp_path):
    files.save_state(tmp_path / "s.pt", {"w": torch.arange(40.0), "step": 3})
    whole = (tmp_path / "s.pt").read_bytes()
    for place in range(0, len(whole), 37):
        (tmp_path / "s.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert told(tmp_path / "s.pt", files.load_state, tmp_path / "s.pt"), place


def test_state_of_another_training(tmp_path):
    files.save_state(tmp_path / "s.pt", {"w": torch.ones(3)})

    def restore():
        with files.continuing(tmp_path / "s.pt") as state:
            torch.nn.Linear(2, 2).load_state_dict(state)

    assert told(tmp_path / "s.pt", restore)
    with files.continuing(tmp_path / "absent.pt") as state:
        assert state is None
    with pytest.raises(KeyError), files.continuing(None):
        raise KeyError("no fault of a file")


PIECES = [b"", b"\0", b"\xff", b"[]", b"{}", b"null", b"NaN", b"1e999", b'"', b"*a", b"!!bool x", b"!!int ''", b"---\n"]


@settings(max_examples=60)
@given(
    name=st.sampled_from(["config.yaml", "journal.json", "shards.jsonl"]),
    steps=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 40), st.sampled_from(PIECES)), min_size=1, max_size=3),
    bit=st.none() | st.integers(0, 4000),
)
def test_any_damage_of_text_is_one_line_or_is_read(tmp_path_factory, name, steps, bit):
    out = tmp_path_factory.mktemp("run")
    if name == "shards.jsonl":
        journal = PartJournal(out, {"shard": int, "files": dict})
        for shard in range(3):
            journal.append({"shard": shard, "files": {"a": "b"}})
        journal.close()
        (path,) = out.iterdir()
    else:
        a_run(out)
        path = out / name
    content = bytearray(path.read_bytes())
    for at, count, piece in steps:
        at %= len(content) + 1
        content[at : at + count] = piece
    if bit is not None and content:
        content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)
    if name == "shards.jsonl":
        told(path, PartJournal(out, {"shard": int, "files": dict}).new)
    elif name == "journal.json":
        told(path, lambda: [Journal(out).seconds(), *Journal(out).changed("teacher")])
    else:
        told(out, manifest.open_run, out, CONFIG)  # the file, or one option in it
        manifest.release()
        assert path.read_bytes() == content or manifest.read_config(path) == CONFIG


@pytest.mark.parametrize(
    "line", [b"garbage", b"[]", b"3", b'{"shard": 1}', b'{"shard": "1", "files": {}}', b"", b"\xff"]
)
def test_line_of_a_part_journal(tmp_path, line):
    types = {"shard": int, "files": dict}
    journal = PartJournal(tmp_path, types)
    journal.append({"shard": 0, "files": {}})
    journal.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert told(path, PartJournal(tmp_path, types).new)


def test_changed_files_are_named_with_their_stage(tmp_path):
    journal, path = a_run(tmp_path), tmp_path / "private" / "teacher.safetensors"
    assert list(Journal(tmp_path).changed("teacher")) == []
    for change, got in (
        (lambda: path.write_text("weighty"), "other bytes"),
        (lambda: path.write_text("we"), "2 bytes in place of 7"),
        (path.unlink, "none"),
    ):
        change()
        assert list(Journal(tmp_path).changed("teacher")) == [(path, got)]
        words = (
            rf"run: {path} must be as the stage teacher left it, got {got}; put it back, or .*delete .*\"teacher\" on"
        )
        with pytest.raises(UserError, match=words):
            journal.check("teacher", "run")
    journal.forget("teacher")
    assert list(Journal(tmp_path).seconds()) == ["data"]


def test_folder_inside_a_run_is_checked(tmp_path):
    a_run(tmp_path / "run")
    place, journal = tmp_path / "run" / "private" / "shadows", Journal(tmp_path / "run")
    place.mkdir()
    for name in ("keep.npy", "model-000.safetensors"):
        (place / name).write_text(name)
    journal.finish("shadows", 1.0, {}, [place])
    (tmp_path / "run" / "private" / "teacher.safetensors").unlink()  # which nobody asked about
    check_inside(place, "audit")
    (place / "keep.npy").write_text("KEEP.npy")
    with pytest.raises(UserError, match=r"audit: .*keep.npy must be as the stage shadows left it, got other bytes"):
        check_inside(os.path.relpath(place), "audit")
    check_inside(tmp_path, "audit")  # no run


def test_equal_tensors_are_equal_bytes(tmp_path):
    from safetensors import safe_open

    tensors = {"b": torch.ones(2), "a": torch.zeros(3), "n": torch.tensor(3), "half": torch.ones(5).bfloat16()}
    names = {f"key {index}": str(index) for index in range(8)}
    actual = set()
    for index in range(6):
        order = dict(sorted(names.items(), key=lambda item: hash((index, item[0]))))
        files.save_tensors(tmp_path / "t.safetensors", dict(reversed(tensors.items())) if index % 2 else tensors, order)
        actual.add((tmp_path / "t.safetensors").read_bytes())
    assert len(actual) == 1
    with safe_open(tmp_path / "t.safetensors", "pt") as archive:
        assert archive.metadata() == names
        for name, value in tensors.items():
            assert torch.equal(archive.get_tensor(name), value)
    assert int.from_bytes(actual.pop()[:8], "little") % 8 == 0


def test_manifest_without_a_shard_binds_nobody(tmp_path):
    other = {**VALUES, "count": 11}
    open_set(tmp_path)
    (tmp_path / ".claims").touch()
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "0.jsonl").touch()
    open_set(tmp_path, other)
    assert json.loads((tmp_path / "manifest.json").read_text()) == other
    at_work = manifest.open_shared(tmp_path, other, "synthesize")
    with pytest.raises(UserError, match="synthesize: count must equal 11 of the data set in .*, got 10"):
        open_set(tmp_path)  # somebody is at work
    at_work.close()
    open_set(tmp_path)
    (tmp_path / "shard-000000.npz").touch()
    with pytest.raises(UserError, match="synthesize: count must equal 10 of the data set in .*, got 11"):
        open_set(tmp_path, other)


def test_manifest_of_somebody_else_stays(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "my page"}')
    with pytest.raises(UserError, match="synthesize: count must equal None"):
        open_set(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "my page"}'


def test_same_file_by_another_name_is_the_same_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npz").touch()
    (tmp_path / "b.npz").touch()
    config = {**CONFIG, "teacher": "a.npz", "data": "a.npz"}
    manifest.open_run("run", config)
    (tmp_path / "run" / "private" / "x").touch()
    manifest.release()
    same = {**config, "teacher": str(tmp_path / "a.npz")}
    assert manifest.check_run("run", same)
    with pytest.raises(UserError, match="run: teacher must equal 'a.npz' of the run in run, got 'b.npz'"):
        manifest.check_run("run", {**config, "teacher": "b.npz"})
    with pytest.raises(UserError, match="run: data must equal"):
        manifest.check_run("run", {**config, "data": "b.npz"})
    assert manifest.check_run("run", {**config, "data": "b.npz"}, moved=("data",))
    with pytest.raises(UserError, match="run: out must lie outside data, the folder imgs, got imgs/run"):
        (tmp_path / "imgs").mkdir()
        manifest.refuse_inside("imgs/run", "imgs", "run")
    manifest.refuse_inside("imgs2", "imgs", "run")


def test_a_result_without_a_key_names_the_journal(tmp_path):
    Journal(tmp_path).finish("gkd", 1.0, {"old": 3})
    actual = Journal(tmp_path).done("gkd")
    assert actual["old"] == 3
    assert actual.get("curves") is None
    with pytest.raises(
        UserError, match=r"journal.json must be of this version .* the result of gkd has no curves; del"
    ):
        actual["curves"]


def test_a_data_set_is_not_begun_at_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "link", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="synthesize: out must be a folder, got"):
            manifest.open_shared(out, VALUES, "synthesize")
