"""Several processes on one folder, one of them killed: the files are those of a single process."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kr_fast.runtime.storage import files

pytestmark = pytest.mark.pipeline
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "toy_sampler.py"
COUNT = 16 * 11 + 5  # twelve shards of two batches, the last one short
ENVIRONMENT = {**os.environ, "KR_FAST_PROGRESS": "0", "OMP_NUM_THREADS": "1"}


def start(out, *options, ranks=0):
    """A process of its own, or ``ranks`` of them under ``torchrun``, which is what ``accelerate launch`` runs too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks else []), str(SCRIPT), str(out), str(COUNT), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process):
    """Images written by each process that told it."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return [int(number) for number in re.findall(r"written (\d+)", out)]  # lines of ranks may run into each other


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def hashes(out):
    result = {path.name: files.sha256(path) for path in sorted(out.glob("shard-*"))}
    index = json.loads((out / "index.json").read_text())
    assert {n: f["sha256"] for shard in index["shards"] for n, f in shard["files"].items()} == result
    assert not list(out.rglob(".*.tmp"))
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "data"
    assert finish(start(out)) == [COUNT]
    return hashes(out)


def test_ranks_share_the_work(tmp_path, alone):
    written = finish(start(tmp_path / "data", ranks=3))
    assert len(written) == 3
    assert sum(written) == COUNT  # nothing twice
    assert hashes(tmp_path / "data") == alone


def test_the_others_take_over_from_one_that_is_killed(tmp_path, alone):
    """Three calls on one folder; the one that is killed holds a claim and half a shard when it dies.

    It is at work before the others start: they would else finish if it came up late.
    """
    dying = start(tmp_path / "data", "kill=3")
    wait_for(tmp_path / "data" / "manifest.json")
    others = [start(tmp_path / "data", "slow=0.02") for _ in range(2)]
    assert dying.wait(timeout=120) == -9
    written = [count for other in others for count in finish(other)]
    assert 0 < sum(written) <= COUNT  # all but what the first had finished
    assert hashes(tmp_path / "data") == alone


def test_a_killed_rank_is_made_good_by_a_later_call(tmp_path, alone):
    """The launcher ends the other ranks too, wherever they are; the later call has another number of them.

    The others are slow: alone they would need six seconds, and the launcher looks ten times a second.
    """
    killed = start(tmp_path / "data", "kill=3", "rank=1", "slow=0.5", ranks=3)
    killed.communicate(timeout=120)
    assert killed.returncode != 0
    for name in (path.name for path in (tmp_path / "data").glob("shard-*")):
        assert files.sha256(tmp_path / "data" / name) == alone[name]
    assert 0 < sum(finish(start(tmp_path / "data", ranks=2))) <= COUNT
    assert hashes(tmp_path / "data") == alone


def test_killed_at_any_time(tmp_path, alone):
    """Not at a batch but by the clock, so in the middle of a write, a sync or a rename."""
    for delay in (0.0, 0.01, 0.03, 0.1):
        process = start(tmp_path / "data", "slow=0.01")
        wait_for(tmp_path / "data" / "manifest.json")
        time.sleep(delay)
        process.kill()
        process.communicate()
    finish(start(tmp_path / "data"))
    assert hashes(tmp_path / "data") == alone
