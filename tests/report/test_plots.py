"""Plots of reports: the same bytes whatever style their user has set, and curves that can be told apart."""

import matplotlib
import numpy as np

from kr_fast.report import audit_plots, plots


def test_figures_do_not_depend_on_the_users_style():
    grid = np.zeros((2, 8, 8, 8, 1), np.uint8)
    values = {"dataset": {"class_names": ["a", "b"]}, "stages": {"teacher": 3.0}}
    plain = plots.all_figures(values, {"synthetic_grid": grid})
    scores, members = np.arange(40.0), np.arange(40) % 2 == 0
    pair = plots.in_both_themes(audit_plots.histogram, scores, members, "score")
    style = {"axes.facecolor": "black", "figure.facecolor": "black", "font.size": 20, "text.color": "#dddddd"}
    with matplotlib.rc_context(style):
        assert plots.all_figures(values, {"synthetic_grid": grid}) == plain
        assert plots.in_both_themes(audit_plots.histogram, scores, members, "score") == pair
        assert matplotlib.rcParams["font.size"] == 20


def test_a_private_teacher_was_trained_here(monkeypatch):
    """It has a loss by step and no epochs."""
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    by_step = {"step": [1, 2], "loss": [2.0, 1.0]}
    teacher, generator, student = plots.curves({"teacher": by_step, "generator": by_step}).axes
    for axis in (teacher, generator):
        assert axis.lines[0].get_ydata().tolist() == [2.0, 1.0]
        assert axis.get_xlabel() == "step"
    assert student.texts[0].get_text() == "not trained here"


def test_no_two_curves_look_alike(monkeypatch):
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    rate = np.linspace(0, 1, 9)
    line = {"fpr": rate, "tpr": rate, "grid": rate[1:], "low": rate[1:], "high": rate[1:]}
    names = [f"attack {at}" for at in range(audit_plots.MOST_LINES)]
    figure = audit_plots.roc(dict.fromkeys(names, line), names[3], {}, 100, 0.95)
    looks = {(each.get_color(), each.get_linestyle()) for each in figure.axes[0].lines}
    assert len(looks) == len(names) + 1  # and the line of chance
    assert figure.axes[0].get_title() == ""
    figure = audit_plots.roc(dict.fromkeys([*names, "another"], line), names[3], {}, 100, 0.95)
    assert figure.axes[0].get_title() == "10 of 11 attacks"
