"""What pages say of the choices on validation: each trial, the decision, and the plot of a search among settings."""

import io

import pytest
from PIL import Image
from report_cases import arrays, summary

from kr_fast import report
from kr_fast.membership.verdict.paths import check_paths, figures
from kr_fast.recycling.config import NAMES
from kr_fast.report import plots
from kr_fast.report.sections import search

VALUES = [(1.0, [0.0, 1.0], "euler"), (1.2, [0.1, 0.9], "heun"), (1.1, [0.2, 0.7], "dpm++")]


def rows():
    """Three settings in two rounds, of which the second is chosen."""
    kept = []
    for number, length in ((1, 1), (2, 2)):
        for at, (sigma, interval, solver) in enumerate(VALUES):
            setting = {"sigma": sigma, "confidence": 0.0, "guidance_interval": interval, "solver": solver}
            about = {"round": number, "length": length, "repeat": 0, "val_accuracy": 0.5 + 0.1 * at, "seconds": 1.5}
            kept.append({**setting, **about, "chosen": at == 1})
    return kept


DECISION = {"best": 0.7, "usual": 0.61, "noise": 0.0488, "repeats": 2, "replaced": True}


@pytest.mark.parametrize("replaced", [True, False, None])
def test_a_search_is_told_and_plotted(tmp_path, replaced):
    facts = summary(tuning=rows())
    if replaced is not None:
        facts["tuning_decision"] = {**DECISION, "replaced": replaced}
    _, page = report.write(tmp_path, facts, arrays())
    text = page.read_text()
    assert "| 1.200 | 0.000 | [0.1, 0.9] | heun | 2 | 2 | 0 | 0.600 | 1.500 | yes |" in text
    if replaced is None:
        assert "The configured setting was the best one." in text
    else:
        said = "replaces the configured one" if replaced else "does not replace the configured one"
        assert f"The best setting {said}: by 2 Students each of other seeds" in text
        assert "mean score best 0.7000, usual 0.6100; it has to be better by more than a standard error" in text
        assert report.metrics(facts)["tuning_decision"]["noise"] == 0.0488
        paths = figures(None, {name: facts[name] for name in ("cas_gap", "tuning", "tuning_decision")})
        check_paths("run", [f"{path}=1" for path in paths], NAMES)
        assert paths["tuning.1.guidance_interval.1"] == 0.9
    assert Image.open(tmp_path / "figures" / "tuning.png").size[0] > 300
    assert "tuning_decision" not in report.metrics(summary())


def test_a_panel_for_each_parameter_that_varies():
    """Sigma, both ends of the interval, the solver: four in a line; the confidence, always 0, has none."""
    wide = Image.open(io.BytesIO(plots.trials(rows()))).size
    less = [{key: value for key, value in row.items() if key != "guidance_interval"} for row in rows()]
    narrow = Image.open(io.BytesIO(plots.trials(less))).size
    assert wide[0] > 1.5 * narrow[0]
    assert wide[1] == narrow[1]


def test_a_search_of_one_value_after_the_other_has_no_plot():
    blocks = list(search.blocks(summary(), {}))
    assert [kind for kind, _ in blocks] == ["heading", "text", "table"] * 2
