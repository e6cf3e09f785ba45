"""``kr-fast audit``: the verdict, and exit code 3 where a figure is above the limit that was asked for."""

import json

import pytest
import yaml
from audit_cases import data
from cli_cases import refused

from kr_fast.cli import main
from kr_fast.membership import save_npz
from kr_fast.runtime.storage import manifest

pytestmark = pytest.mark.usefixtures("no_progress", "released_run")


@pytest.fixture
def command(tmp_path):
    save_npz(tmp_path / "s.npz", data())
    return ["audit", "--signals", str(tmp_path / "s.npz"), "--out", str(tmp_path / "a"), "--attacks", "loss"]


def verdict(tmp_path):
    manifest.release()
    written = json.loads((tmp_path / "a" / "release" / "audit.json").read_text())
    assert next(iter(written)) == "verdict"
    return written["verdict"], [rule for rule in written["verdict"]["rules"] if rule["source"] == "asked"]


def test_exit_codes_and_other_limits_of_the_same_audit(command, tmp_path, capsys):
    """The verdict of a finished audit changes with its limits, and nothing else does."""
    assert main([*command, "--fail-above", "target.auc_high=1", "--fail-above", "target.epsilon=99"]) == 0
    shown = capsys.readouterr().out
    first, asked = verdict(tmp_path)
    assert shown.startswith("verdict: do not share\n" + first["reasons"][0])
    assert "in at most 15 % of audits" in shown
    assert [(rule["path"], rule["passed"]) for rule in asked] == [("target.auc_high", True), ("target.epsilon", True)]
    arrays = (tmp_path / "a" / "private" / "audit.npz").read_bytes()
    # One that is above its limit, and one that this audit does not have.
    (tmp_path / "c.yaml").write_text("fail-above: [target.auc_high=0.6, target.loss.aop=9]\nverdict_controls: false\n")
    assert main([*command, "--config", str(tmp_path / "c.yaml")]) == 3
    second, asked = verdict(tmp_path)
    assert [(rule["path"], rule["limit"]) for rule in asked] == [("target.auc_high", 0.6), ("target.loss.aop", 9)]
    assert [rule["passed"] for rule in asked] == [False, False]
    assert asked[0]["value"] > 0.6
    assert asked[1]["value"] is None
    assert not any("controls" in rule["path"] for rule in second["rules"])
    # This leak may be allowed; it is still not known whether the attack has power.
    assert main([*command, "--verdict-auc", "0.9", "--verdict-records", "600"]) == 0
    assert verdict(tmp_path)[0]["decision"] == "not decided"
    assert (tmp_path / "a" / "private" / "audit.npz").read_bytes() == arrays
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["verdict_records"] == 600


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fail-above", "target.auc_hihg=0.5"], "got target.auc_hihg (nearest: target.auc_high, target.auc, "),
        (["--fail-above", "target.auc_high"], "fail_above must be PATH=LIMIT with a finite number, such as target."),
        (["--verdict-auc", "0.4"], "audit: verdict_auc must be in [0.5, 1], got 0.4"),
    ],
)
def test_limits_are_refused_before_anything_runs(command, tmp_path, capsys, flags, words):
    assert words in refused(capsys, *command, *flags)
    assert not (tmp_path / "a").exists()
