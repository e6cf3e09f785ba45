"""The notebook and the job of Slurm in examples/, on a finished run of the toy preset."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from toy_runs import QUIET

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
NOTEBOOK = EXAMPLES / "whole_run.ipynb"
TORCHRUN = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
pytestmark = pytest.mark.pipeline


@pytest.mark.usefixtures("released_run", "one_thread", "no_progress")
def test_cells_of_the_notebook(finished):
    """Its first cell, which holds the size and the folder of the run, replaced by one that names this run."""
    matplotlib.use("Agg")
    scope, cells = {}, [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    sources = [f'preset, out, options = "toy", {str(finished[0])!r}, {{}}']
    sources += ["".join(cell["source"]) for cell in cells[1:]]
    for number, source in enumerate(sources):
        exec(compile(source, f"code cell {number}", "exec"), scope)
    assert scope["plt"].get_fignums() == [1, 2, 3]
    scope["plt"].close("all")
    accuracy = scope["result"].metrics["student"]["test_accuracy"]
    assert scope["counts"].diagonal().sum() / scope["counts"].sum() == pytest.approx(accuracy)


def test_what_is_committed_of_the_notebook():
    text = NOTEBOOK.read_text()
    assert text.count('"image/png"') in (0, 3)  # without outputs, or with all
    assert '"output_type": "error"' not in text
    assert len(text) < 200_000
    assert not re.search(r"/(tmp|home|root|work)/", text)


def test_job_of_slurm(finished, tmp_path):
    """Two processes of one node, where srun and scontrol are what they do there."""
    for name, line in (("srun", 'exec "$@"'), ("scontrol", "echo localhost"), ("torchrun", TORCHRUN)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}
    job |= {"SLURM_CPUS_PER_TASK": "2", "MODEL": str(finished[0]), "OUT": str(tmp_path / "set"), "COUNT": "200"}
    job |= {"SHARD_SIZE": "64", "PORT": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "synthesize_slurm.sh"), "--micro-batch", "64"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET, **job})
    assert done.returncode == 0, done.stderr
    shards = json.loads((tmp_path / "set" / "index.json").read_text())["shards"]
    assert [shard["count"] for shard in shards] == [64, 64, 64, 8]
    assert len(list((tmp_path / "set").glob("shard-*.tar"))) == 4
