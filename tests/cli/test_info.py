"""``kr-fast info``: what a bug report needs, and why a backend is missing."""

import json

import pytest
import torch

from kr_fast.backends import native, registry
from kr_fast.cli import info, main


def test_json_holds_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "of no concern")
    assert main(["info", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert list(facts) == ["versions", "machine", "build", "environment", "backends", "ops"]
    assert facts["versions"]["torch"] == torch.__version__
    assert {"KR_FAST_PROGRESS", "OMP_NUM_THREADS"} <= facts["environment"].keys()
    assert "of no concern" not in text
    assert {"system", "cpu", "memory", "threads", "gpu", "gpu driver", "torch is built for"} <= facts["machine"].keys()
    assert facts["backends"]["cpu"] == f"available, {native.isa()}"
    assert facts["build"]["_cpu"] != "not built"


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda can run")
def test_a_missing_backend_has_a_reason_with_a_mend():
    facts = info.collect()
    for name in ("cuda", "triton"):
        why = facts["backends"][name]
        assert "; " in why
        assert {cells[name] for op, cells in facts["ops"].items() if registry.has(op, name)} == {why}


def test_the_table_says_what_is_refused_though_its_backend_runs():
    facts = info.collect()
    facts["ops"]["roc"]["cpu"], facts["backends"]["cpu"] = "tensors must be small, got large", "available, scalar"
    text = info.lines(facts)
    rows = {line.split()[0]: line.split() for line in reversed(text) if line.startswith("  ")}
    assert rows["roc"] == ["roc", "yes", "no", "-", "-"]
    assert text[-1] == "  roc on cpu: tensors must be small, got large"
    assert rows["bootstrap_auc"][2] == "float64"
