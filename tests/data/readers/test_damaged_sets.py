"""Sets of every format with a damaged file: read, or refused in one line, and nothing is left behind."""

import shutil

import data_cases
import pytest
from cli_cases import refused
from data_cases import arrays, read_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast import data

FORMATS = ("folder", "table", "npz", "parquet", "saved", "shards")
FOREIGN = (
    *(b"", b"\0" * 600, b"PK\3\4", b"\x89PNG\r\n\x1a\n", b"PAR1", b"ARROW1\0\0", b"\x1f\x8b\x08", b"\xff\xfe\0"),
    *(b"[]", b"{}", b"null", b"[" * 9999, b'"\n', b"image,label\n", b"version https://git-lfs.github.com/spec/v1\n"),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """format -> (source, options), 6 / 3 / 3 images of 3 classes."""
    root, made = tmp_path_factory.mktemp("sets"), arrays(6, 3, 3, shape=(8, 9, 3), classes=3)
    parts = {which: (made[f"{which}_images"], made[f"{which}_labels"][:, 0]) for which in ("train", "val", "test")}
    return {name: getattr(data_cases, f"as_{name}")(root / name, parts) for name in FORMATS}


def copied(sets, name, to):
    """(source, options, its files) of a copy below ``to``."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    source, options = sets[name]
    copy = to / source.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    options = {key: shutil.copy(path, to) for key, path in options.items()}
    files = sorted(path for path in to.rglob("*") if path.is_file())
    return copy, options, [path for path in files if path.suffix != ".png"] or files


damages = st.lists(
    st.tuples(
        st.sampled_from(["byte", "bit", "cut", "insert", "remove", "replace"]),
        st.integers(0, 1 << 16),
        st.integers(0, 255),
        st.sampled_from(FOREIGN),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, steps):
    content = bytearray(content)
    for what, place, value, foreign in steps:
        at = place % (len(content) + 1)
        if what == "byte":
            content[at : at + 1] = bytes([value])
        elif what == "bit" and at < len(content):
            content[at] ^= 1 << value % 8
        elif what == "cut":
            del content[at:]
        elif what == "insert":
            content[at:at] = foreign
        elif what == "remove":
            del content[at : at + value]
        elif what == "replace":
            content = bytearray(foreign)
    return bytes(content)


@settings(max_examples=80)
@given(name=st.sampled_from(FORMATS), which=st.integers(0, 9), steps=damages)
def test_any_damage_is_one_line_or_a_set(sets, tmp_path_factory, name, which, steps):
    source, options, files = copied(sets, name, tmp_path_factory.getbasetemp() / "damaged")
    file = files[which % len(files)]
    file.write_bytes(damaged(file.read_bytes(), steps))
    result = read_or_refused(lambda: data.load_uncut(source, options=data.ReadOptions(**options)))
    if result is None:
        return
    _, names, splits = result
    for split in splits.values():
        assert len(split.images) == len(split.labels)
        assert split.labels.numpy().min(initial=0) >= 0
        assert split.labels.numpy().max(initial=0) < len(names)


@pytest.mark.parametrize("how", ["empty", "half", "foreign"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_run_on_a_damaged_set_ends_with_one_line_and_leaves_nothing(sets, tmp_path, capsys, name, how):
    source, options, files = copied(sets, name, tmp_path / "set")
    for file in files:
        content = file.read_bytes()
        file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "foreign": b"\x89HDF\r\n" * 99}[how])
    given_options = [f"--{key}={value}" for key, value in options.items()]
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, "run", "--data", source, *given_options, "--out", tmp_path / "out", "--preset", "toy")
    assert line.startswith("kr-fast: data: ")
    assert sorted(tmp_path.rglob("*")) == before
