"""``kr-fast audit``: options of the attacks, and combinations that are refused in one line before anything is read."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from audit_cases import COUNT, data, with_population
from cli_cases import refused

from kr_fast.cli import main
from kr_fast.membership import ShadowSignals, save_npz
from kr_fast.runtime.storage import manifest

MODELS = ["--model", "mynet:make", "--checkpoint", "net.pt", "--data", "data.npz"]


pytestmark = pytest.mark.usefixtures("no_progress", "released_run")


def test_options_of_rmia(tmp_path):
    save_npz(tmp_path / "s.npz", with_population())
    command = ["audit", "--signals", tmp_path / "s.npz", "--attacks", "rmia", "rmia_offline"]
    result = []
    for name, more in (
        ("a", []),
        ("b", ["--rmia-gamma", "2", "--rmia-offline-a", "0.6", "--rmia-predicate", "reciprocal"]),
    ):
        assert main([*map(str, [*command, "--out", tmp_path / name, *more])]) == 0
        manifest.release()
        result.append(json.loads((tmp_path / name / "release" / "audit.json").read_text()))
    assert result[0]["setting"]["rmia"] == {"gamma": 1.0, "offline_a": 0.33, "predicate": "ratio"}
    assert result[1]["setting"]["rmia"] == {"gamma": 2.0, "offline_a": 0.6, "predicate": "reciprocal"}
    assert result[1]["details"]["config"]["rmia_gamma"] == 2.0
    for attack in ("rmia", "rmia_offline"):  # one query: gamma moves the counts, and no rank
        before, after = (np.load(tmp_path / name / "private" / "audit.npz")[f"target/{attack}/scores"] for name in "ab")
        assert np.mean(after < before) > 0.5


def test_too_few_shadows_for_an_attack_are_one_line(tmp_path, capsys):
    whole = data()
    keep = torch.tensor([True, False])[(torch.arange(2)[:, None] + torch.arange(COUNT)) % 2]
    shadows = ShadowSignals(keep, {"phi": whole.shadows["shadows"].signals["phi"][:, :, :2]})
    save_npz(tmp_path / "s.npz", dataclasses.replace(whole, shadows={"shadows": shadows}))
    assert main(["audit", "--signals", str(tmp_path / "s.npz"), "--out", str(tmp_path / "a"), "--attacks", "lira"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kr-fast: lira")]
    assert lines == ["kr-fast: lira: keep must give some example 2 shadows out of it for fixed variance, got 1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rmia-gamma", "0"], "audit: rmia_gamma must be in (0, 1000], got 0.0"),
        (["--rmia-offline-a", "2"], "audit: rmia_offline_a must be in [0, 1], got 2.0"),
        (["--rmia-predicate", "x"], "audit: rmia_predicate must be one of ratio, ratio_strict, reciprocal, got x"),
        (
            ["--val-fraction", "0.2"],
            "audit: val_fraction must be left out without cut, where it does nothing, got 0.2",
        ),
        (["--test-fraction", "0.5"], "audit: test_fraction must be left out without cut, where it does nothing, got"),
        (["--rmia-gamma", "2", "--attacks", "lira"], "audit: rmia_gamma must be left out without rmia or rmia_offline"),
    ],
)
def test_refused(tmp_path, capsys, flags, words):
    assert words in refused(capsys, "audit", *MODELS, "--out", tmp_path / "x", *flags)
    assert not (tmp_path / "x").exists()
