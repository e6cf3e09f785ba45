"""Two processes under Accelerate: each draws from its own records, sums are added, noise comes once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from private_cases import losses, network

from kr_fast.privacy import make_private


@pytest.mark.pipeline
def test_two_processes_are_one_training(tmp_path):
    folder = Path(__file__).parent
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(folder / "two_ranks.py"), str(tmp_path)]
    quiet = {"OMP_NUM_THREADS": "1", "KR_FAST_PROGRESS": "0", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    assert done.returncode == 0, done.stderr
    (first, weights, found), (second, others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(weights, others)
    grid = 4 * found.double() * 2.0**20  # whose points no rank's sum can be told from
    assert torch.equal(grid, grid.round())
    assert all(record % 2 == 0 for step in first for record in step)
    assert all(record % 2 == 1 for step in second for record in step)
    assert any(first)
    assert any(second)

    model, x, labels = network("images")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "expected_batch_size": 4.0, "seed": 3, "not_private": True}
    private = make_private(model, optimizer, **options)
    for of_first, of_second in zip(first, second, strict=True):
        if together := [*of_first, *of_second]:
            private.backward(losses(model, x[together], labels[together]))
        private.step()
    torch.testing.assert_close(torch.cat([p.flatten() for p in model.parameters()]), weights, rtol=1e-4, atol=1e-5)
