"""A whole run with every search: killed within one, continued, and the checkpoint that it chose taken by others."""

import json
import signal

import pytest
import torch
from toy_runs import metrics, toy

from kr_fast.recycling import trained_generator
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime.storage.layout import Folder

FLAGS = ["--num-shadows", "0", "--ema-lengths", "0.1", "--checkpoint-halving", "--tune-trials", "4"]
# Short Students that take no time, by whose scores the average of length 0.1 and a large sigma are the best.
SCORES = """
from kr_fast.recycling.stages.distillation import gkd
def trial(context, teacher, sampling, length=1, repeat=0):
    {before}
    return 0.5 + 0.2 * (sampling.ema_length > 0) + 2 * (sampling.noise_scale - 1)
gkd.trial = trial
"""
DIES = "import os, signal; repeat and os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.pipeline
def test_a_search_is_continued_and_its_choice_is_used(tmp_path):
    out = tmp_path / "run"
    toy(out, *FLAGS, before=SCORES.format(before=DIES), check=-signal.SIGKILL)
    log = out / "private" / "state" / "trials.json"
    before = json.loads(log.read_text())
    toy(out, *FLAGS, before=SCORES.format(before="pass"))
    after, figures = json.loads(log.read_text()), metrics(out)
    assert {name: after[name] for name in before} == before  # seconds too: none was done again
    rows = figures["tuning"]
    assert len(after) - len(before) == sum(row["repeat"] > 0 for row in rows) == 4
    assert figures["tuning_decision"]["replaced"]
    chosen = [row for row in figures["checkpoints"] if row["chosen"]]
    assert [(row["step"], row["ema_length"]) for row in chosen] == [(12, 0.1)]
    assert [path.name for path in (out / "private" / "state").iterdir()] == ["trials.json"]  # no snapshot
    sampling = Sampling(**json.loads((out / "journal.json").read_text())["tuning"]["result"]["sampling"])
    assert (sampling.checkpoint, sampling.ema_length) == (12, 0.1)
    assert sampling.noise_scale == max(row["sigma"] for row in rows) > 1

    used = trained_generator.open_generator(out, torch.device("cpu"))
    assert used.sampling["noise_scale"] == sampling.noise_scale
    weights, usual = (
        generator.load(Folder(out).generator(12, length), torch.device("cpu"))[0].state_dict() for length in (0.1, 0.0)
    )
    assert all(map(torch.equal, used.network.state_dict().values(), weights.values()))
    assert not all(map(torch.equal, weights.values(), usual.values()))
