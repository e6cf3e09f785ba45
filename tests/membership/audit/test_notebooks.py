"""What notebooks show of results: a line or two, a table, a plot, and never the numbers of a tensor."""

import matplotlib
import numpy as np
import pytest
import torch
from audit_cases import COUNT, data

import kr_fast
from kr_fast.data import Dataset, Split
from kr_fast.ensemble import Shadows
from kr_fast.membership import Choices, audit_signals
from kr_fast.models import classifier
from kr_fast.synthesis import LabelPlan

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def report():
    return audit_signals(data(), Choices(attacks=("lira", "loss")))


def test_results_are_short(report):
    images, labels = torch.zeros(50, 8, 8, 1, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64)
    split = Split(images, labels)
    array = kr_fast.ModelArray([classifier("resnet8", num_classes=2, in_channels=1, width=4, image_size=8)] * 3)
    for value, words in (
        (report, "AuditReport(target: lira Curve(AUC 0."),
        (report.data, f"bool [12, {COUNT}]"),
        (report.curves["target"]["lira"], "members,"),
        (split, "Split(images=uint8 [50, 8, 8, 1], labels=int64 [50])"),
        (Dataset("set", ("a", "b"), split, split, split), "train=Split(images=uint8 [50, 8, 8, 1]"),
        (array, "ModelArray(3 x ResNet, float32, cpu, bn='eval')"),
        (Shadows(array, torch.zeros(3, 50, dtype=torch.bool)), "keep=bool [3, 50]"),
        (LabelPlan.balanced(1000), "LabelPlan(pattern=int64 [1000], num_classes=1000)"),
    ):
        text = repr(value)
        assert words in text
        assert len(text) < 700
        assert "tensor(" not in text
        assert "array(" not in text


def test_a_notebook_shows_tables_and_words(report):
    text = report._repr_html_()
    assert text.startswith('<ul class="note"><li>verdict: do not share</li><li>LiRA online on target tells')
    for words in (f"{report.curves['target']['lira'].auc:.3f} [", "Warning: ", "LiRA online"):
        assert words in text


def test_a_curve_draws_itself(report):
    curves = report.curves["target"]
    axes = curves["lira"].plot()
    assert axes is curves["loss"].plot(axes, label="loss")
    chance, lira, loss = axes.get_lines()
    least = 0.5 / curves["lira"].negatives
    np.testing.assert_array_equal(lira.get_xdata(), np.maximum(curves["lira"].fpr, least))
    np.testing.assert_array_equal(loss.get_ydata(), np.maximum(curves["loss"].tpr, least))
    assert [line.get_label() for line in (chance, lira, loss)] == ["chance", f"AUC {curves['lira'].auc:.3f}", "loss"]
