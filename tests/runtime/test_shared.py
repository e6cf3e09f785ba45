"""What processes that share a folder rely on: the part journal, claims, and one manifest."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from kr_fast.runtime import log
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import manifest
from kr_fast.runtime.storage.claims import Claims
from kr_fast.runtime.storage.journal import PartJournal

VALUES = {"format": "npy", "sampler": {"seed": 0, "crop": [8, 8]}}


def test_each_record_is_told_once_and_to_everybody(tmp_path):
    a, b = PartJournal(tmp_path / "j"), PartJournal(tmp_path / "j")
    assert a.new() == []
    a.append({"part": 1})
    b.append({"part": 2})
    b.append({"part": 3})
    assert sorted(record["part"] for record in a.new()) == [1, 2, 3]
    assert a.new() == []
    a.append({"part": 4})
    assert [record["part"] for record in a.new()] == [4]
    assert sorted(record["part"] for record in b.new()) == [1, 2, 3, 4]
    assert len(list((tmp_path / "j").iterdir())) == 2
    a.close()
    b.close()


def test_a_line_that_was_cut_off_is_no_record(tmp_path):
    journal = PartJournal(tmp_path)
    journal.append({"part": 1})
    journal.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'{"part": 2')
    reader = PartJournal(tmp_path)
    assert reader.new() == [{"part": 1}]
    path.write_bytes(path.read_bytes() + b"}\n")  # it was still being written
    assert reader.new() == [{"part": 2}]


def test_a_record_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    journal = PartJournal(tmp_path)
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(OSError, match="a record could not be written whole; is the disk full"):
        journal.append({"part": 1})


def other_process(path, part):
    """What ``take`` answers in another process."""
    code = f"from kr_fast.runtime.storage.claims import Claims; print(Claims({str(path)!r}).take({part}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_claims_exclude_others_and_end_with_their_process(tmp_path):
    claims = Claims(tmp_path / "claims")
    assert claims.take(3)
    assert claims.take(2**40)
    assert other_process(tmp_path / "claims", 3) == "False"
    assert other_process(tmp_path / "claims", 4) == "True"
    assert claims.take(4)  # the other one has ended
    claims.free(3)
    assert other_process(tmp_path / "claims", 3) == "True"
    claims.close()
    assert other_process(tmp_path / "claims", 2**40) == "True"


def test_a_file_system_without_locks_grants_every_claim(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claims = Claims(tmp_path / "claims")
    assert claims.take(0)
    assert claims.take(1)
    claims.free(0)
    assert not claims.supported
    assert caplog.text.count("processes may do the same work twice") == 1
    claims.close()


def test_one_manifest_for_all(tmp_path):
    out = tmp_path / "a" / "b"
    first = manifest.open_shared(out, VALUES, "op")
    assert first.out == out
    manifest.open_shared(out, VALUES, "op").close()  # while the first still works
    assert json.loads((out / "manifest.json").read_text()) == VALUES
    other = {"format": "npy", "sampler": {"seed": 0, "crop": [8, 9]}}
    with pytest.raises(UserError, match=r"op: sampler.crop must equal \[8, 8\] of the data set in .*, got \[8, 9\];"):
        manifest.open_shared(out, other, "op")
    with pytest.raises(UserError, match="op: extra must equal None of the data set in .*, got 1; choose another out"):
        manifest.open_shared(out, {**VALUES, "extra": 1}, "op")
    first.close()


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / ".manifest.json.node.123.kr_fast.tmp").write_text("{")
    manifest.open_shared(tmp_path, VALUES, "op").close()


@pytest.mark.parametrize(("rank", "shown"), [(None, 2), ("0", 2), ("1", 1)])
def test_other_ranks_show_their_warnings_only(monkeypatch, capsys, rank, shown):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    log.show()
    log.logger.info("read")
    log.logger.warning("odd")
    assert capsys.readouterr().err.count("kr-fast: ") == shown
