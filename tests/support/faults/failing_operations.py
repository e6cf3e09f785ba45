"""Jobs in which one operation of the file system after the other fails; run with tests/support/faults.c preloaded.

``python failing_operations.py FOLDER`` prints JSON: job -> how many operations there were of each kind, and what went
wrong.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import Journal

KINDS = ("open", "write", "fsync", "rename", "mkdir", "link", "unlink")
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO)


def a_run(out: Path) -> None:
    """What the stages of a run do with files, and how they continue."""
    try:
        manifest.open_run(out, {"seed": 0})
        journal, place = Journal(out), out / "private"
        if journal.done("teacher") is None:
            files.load_state(place / "state.pt")
            files.save_state(place / "state.pt", {"w": torch.ones(3)})
            files.save_tensors(
                place / "teacher.safetensors", {"w": torch.ones(3)}, {"architecture": "a", "classes": "2"}
            )
            files.save_array(place / "synthetic" / "images.npy", np.arange(5))
            files.write_json(place / "trials.json", {"a": 0.5})
            (place / "state.pt").unlink(missing_ok=True)
            journal.finish("teacher", 0.0, {"a": 1}, [place / "teacher.safetensors", place / "synthetic"])
        journal.check("teacher", "run")
        if journal.done("generator") is None:
            if not (place / "step").exists():
                with files.atomic_folder(place / "step") as folder:
                    files.write_text(folder / "unet" / "config.json", "{}")
            journal.finish("generator", 0.0, {}, [place / "step"])
        assert files.load_tensors(place / "teacher.safetensors")["w"].sum() == 3
    finally:
        manifest.release()


def a_data_set(out: Path) -> None:
    """Two small shards."""
    from toy_sampler import plan, sampler

    import kr_fast

    kr_fast.synthesize(sampler((1, 8, 8), micro_batch=8), plan(), out, count=12, shard_size=8)


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of all files but the journals of processes, whose names and order are theirs."""
    result = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in result}


def failing(job, folder: Path) -> dict:
    faults = ctypes.CDLL(None)
    job(folder / "whole")
    expected, out, wrong = contents(folder / "whole"), folder / "out", []
    faults.faults_begin(str(out).encode(), 0, 0)
    job(out)
    seen, number = {kind: faults.faults_count(index) for index, kind in enumerate(KINDS)}, 0
    while True:
        number += 1
        shutil.rmtree(out)
        faults.faults_begin(str(out).encode(), number, ERRORS[number % len(ERRORS)])
        said = None
        try:
            job(out)
        except (UserError, OSError) as error:
            said = str(error)
        except Exception as error:
            wrong.append(["not one line", number, repr(error)])
        failed = faults.faults_failed()
        faults.faults_begin(str(out).encode(), 0, 0)
        if failed < 0:
            return {"seen": seen, "tried": number - 1, "wrong": wrong}
        what = [KINDS[failed], number, said]
        # Without links a rename does, and a folder that is there already need not be made.
        if said is None and KINDS[failed] not in ("link", "mkdir"):
            wrong.append(["not told", *what])
        elif said is not None and (str(out) not in said or "\n" in said or ".tmp" in said):
            wrong.append(["does not name the file", *what])
        try:
            job(out)
            if contents(out) != expected:
                wrong.append(["other bytes", *what, sorted(contents(out).items() ^ expected.items())])
        except Exception as error:
            wrong.append(["does not continue", *what, repr(error)])


if __name__ == "__main__":
    os.environ["KR_FAST_PROGRESS"] = "0"
    torch.set_num_threads(1)
    jobs = {"run": a_run, "set": a_data_set}
    print(json.dumps({name: failing(job, Path(sys.argv[1]) / name) for name, job in jobs.items()}))
