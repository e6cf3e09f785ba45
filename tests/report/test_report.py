"""The report from plain values: intervals, honest words, missing parts, names from outside, strict JSON."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kr_fast import report
from kr_fast.report import plots, tables


def attack(auc, low, high, false_positives=12):
    tpr = {"tpr": 0.05, "interval": [0.02, 0.09], "false_positives": false_positives,
           "point_claim": false_positives >= 10}  # fmt: skip
    return {"auc": auc, "auc_ci": [low, high], "balanced_accuracy": 0.55, "tpr_at_fpr": {"0.01": tpr}}


def summary(**changes):
    audit = {
        "setting": {"members": 900, "non_members": 500, "num_shadows": 16, "augment": "none", "lira_variance": "fixed",
                    "warnings": []},
        "teacher": {"lira": attack(0.6, 0.57, 0.63), "loss": attack(0.55, 0.52, 0.58, 3)},
        "student": {"lira": attack(0.51, 0.48, 0.54), "loss": attack(0.5, 0.47, 0.53)},
    }  # fmt: skip
    found = {
        "title": "Knowledge Recycling on <b>set</b>",
        "command": "kr-fast run --out x",
        "config": {"seed": 0},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "stages": {"teacher": 3.0, "gkd": 4.5},
        "dataset": {"name": "<script>alert(1)</script>", "num_classes": 2, "class_names": ["<i>a", "b|c"],
                    "train": 900, "val": 100, "test": 500, "height": 8, "width": 8, "channels": 1},
        "teacher": {"test_accuracy": 0.97, "val_accuracy": 0.98, "parameters": 10},
        "student": {"test_accuracy": 0.95, "val_accuracy": 0.96, "parameters": 10},
        "cas_gap": 0.02,
        "audit": audit,
        "aop": {"teacher": 0.67, "student": 0.91},
        "checkpoints": [{"step": 9, "val_accuracy": 0.5, "chosen": True}],
        "tuning": [{"sigma": 1.0, "val_accuracy": 0.5, "chosen": True}],
        "notes": ["few shadows"],
    }  # fmt: skip
    return found | changes


def arrays():
    grid = np.zeros((2, 8, 8, 8, 1), np.uint8)
    curves = {"teacher": {"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_accuracy": [0.5, 0.9]},
              "generator": {"step": [20, 40], "loss": [1.0, 0.4]},
              "student": {"period": [1, 2], "loss": [3.0, 1.0], "val_accuracy": [0.4, 0.8]}}  # fmt: skip
    rate = np.linspace(0, 1, 50)
    roc = {f"{m}/{a}": {"fpr": rate, "tpr": rate**0.8} for m in ("teacher", "student") for a in ("lira", "loss")}
    return {"real_grid": grid, "synthetic_grid": grid + 9, "curves": curves, "roc": roc}


def test_both_documents_are_written(tmp_path):
    html, markdown = report.write(tmp_path, summary(), arrays())
    text = html.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>set" not in text
    for words in (
        "97.00 %",
        "95.00 %",
        "0.600 [0.570, 0.630]",
        "gap of 2.00 points",
        "few shadows",
        "not differential",
    ):
        assert words in text, words
        assert words in markdown.read_text(), words
    assert "tells members from non-members better than chance on the Teacher" in text
    assert "is not above chance here on the Student" in text
    assert "only 3 false positives: no point claim" in text
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert figures == ["curves.png", "images.png", "roc.png", "stages.png"]
    for name in figures:
        image = Image.open(tmp_path / "figures" / name)
        assert image.width >= 600
        assert np.asarray(image).std() > 5  # something is drawn


def test_what_is_missing_is_said(tmp_path):
    bare = summary(audit=None, aop=None, checkpoints=[], tuning=[], stages={})
    _, markdown = report.write(tmp_path, bare, arrays() | {"roc": {}})
    text = markdown.read_text()
    for words in (
        "No audit was run",
        "Checkpoint Optimisation was not run",
        "Tuning was not run",
        "No membership attack",
    ):
        assert words in text


def test_own_teacher_has_no_curve(tmp_path):
    given = arrays()
    given["curves"]["teacher"] = {}
    html, _ = report.write(tmp_path, summary(), given)
    assert "Training" in html.read_text()


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_of_images(classes, channels):
    grid = np.random.default_rng(0).integers(0, 256, (classes, 8, 28, 28, channels), dtype=np.uint8)
    image = Image.open(io.BytesIO(plots.grid(grid, grid, [f"class {index}" for index in range(classes)])))
    assert max(image.size) < 3000


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.97, 500), (1.0, 40)])
def test_wilson_is_scipys(share, count):
    wanted = stats.binomtest(round(share * count), count).proportion_ci(0.95, "wilson")
    assert tables.wilson(share, count) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_metrics_are_strict_json():
    found = tables.metrics(summary(cas_gap=float("nan"), aop={"teacher": float("inf"), "student": 1.0}))
    assert found["cas_gap"] is None
    assert found["aop"] == {"teacher": None, "student": 1.0}
    json.dumps(found, allow_nan=False)
    assert found["audit"]["student"]["lira"]["auc"] == 0.51


def test_tables_escape_their_separator():
    assert tables.markdown_table([["a|b", "c"], ["d\ne", 1]]) == "| a\\|b | c |\n|---|---|\n| d e | 1 |"
