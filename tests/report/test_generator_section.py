"""The section on the generator's weights: every figure of the JSON, and what each calibration and result says."""

import copy

import pytest

from kr_fast.report.sections import generator
from kr_fast.report.tables import interval, number

POINT = {"tpr": 0.25, "fpr": 0.01, "false_positives": 12, "interval": [0.2, 0.3], "point_claim": True}
FIGURES = {
    "calibration": "early checkpoint",
    "early": 125,
    "checkpoint": 417,
    "levels": [0.1, 0.4],
    "draws": 4,
    "members": 1019,
    "non_members": 599,
    "auc": 0.627,
    "auc_ci": [0.6, 0.654],
    "tpr_at_fpr": {"0.1": POINT, "0.01": {**POINT, "tpr": None, "point_claim": False}},
    "by_level": [
        {"level": 0.1, "auc": 0.581, "auc_ci_corrected": [0.53, 0.62], "role": "exploratory"},
        {"level": 0.4, "auc": 0.592, "auc_ci_corrected": [0.54, 0.63], "role": "exploratory"},
    ],
    "uncalibrated": {"auc": 0.564, "auc_ci_corrected": [0.52, 0.61], "role": "exploratory"},
}


def page(figures, blind=True):
    setting = {"level": 0.95, "negative_controls": {"blind": {"auc": 0.6, "passed": blind}, "targets": {}}}
    blocks = list(generator.blocks({"generator": figures, "setting": setting}))
    texts = [content for kind, content in blocks if kind == "text"]
    return " ".join(texts), [row for kind, rows in blocks if kind == "table" for row in rows]


def test_the_figures_are_those_of_the_json():
    text, rows = page(FIGURES)
    assert f"{number(0.627)}, 95 % interval {interval([0.6, 0.654])}" in text
    assert "names the member in 63 of 100 pairs" in text
    for words in ("step 417", "1019 members and 599 non-members", "0.1, 0.4", "4 times", "step 125"):
        assert words in text, words
    assert [row[2] for row in rows[1:]] == [
        f"{number(row['auc'])} {interval(row.get('auc_ci') or row['auc_ci_corrected'])}"
        for row in (FIGURES, *FIGURES["by_level"], FIGURES["uncalibrated"])
    ]
    assert "25" in rows[1][3]
    assert all(len(row) == len(rows[0]) for row in rows)


def test_what_is_said_follows_from_the_figures():
    text, _ = page(FIGURES)
    assert "better than chance" in text
    assert "handing over the generator would leak" in text
    assert "tell the two sides apart" not in text
    assert "tell the two sides apart" in page(FIGURES, blind=False)[0]
    unseen = {**copy.deepcopy(FIGURES), "auc": 0.51, "auc_ci": [0.48, 0.54]}
    text, _ = page(unseen)
    assert "would leak" not in text
    assert "does not show that handing it over would be safe" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--audit-generator retrained"),
        ({"calibration": "image"}, "what its pixels predict"),
        (
            {
                "calibration": "retrained",
                "generators": 16,
                "recipe": {"targets": 16, "auc": {"mean": 0.842, "interval": [0.8, 0.87]}},
            },
            f"On average over 16 generators made as it was, each attacked from the others, the AUC is {number(0.842)}",
        ),
        ({"calibration": "retrained", "generators": 16}, "those of 16 generators of the same recipe"),
    ],
)
def test_each_calibration_is_told(changes, words):
    assert words in page({**FIGURES, **changes})[0]


def test_nothing_where_it_was_not_attacked():
    assert list(generator.blocks({"setting": {}})) == list(generator.blocks({"generator": None})) == []
