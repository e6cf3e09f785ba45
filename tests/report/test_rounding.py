"""Figures as they are written: no rounding that turns a conclusion round, one unit in a column, no p of 0."""

import pytest
from report_cases import attack, recipe, whole_audit

from kr_fast.report import audit_tables, render, tables
from kr_fast.report.sections import released
from kr_fast.report.sections.verdict import rules
from kr_fast.report.sentences import OF_RUN, verdict


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"), (0.5003, "0.5003"), (0.49996, "0.49996"), (0.4994, "0.499"), (0.0, "0.000"), (-0.0, "0.000"),
        (0.0002, "0.0002"), (-0.0003, "-0.0003"), (0.5 + 1e-9, "0.500"), (float("inf"), "inf"),
        (-1e-17, "0.000"),
    ],
)  # fmt: skip
def test_rounding_moves_no_figure_to_chance(value, text):
    assert tables.number(value) == text
    assert tables.interval([value, 0.56]) == f"[{text}, 0.560]"


def test_a_sentence_and_its_interval_agree():
    audit = whole_audit(full=False, control=False, released=False, recipes=False)
    audit["teacher"]["lira"] = attack(0.53, 0.5003, 0.56)
    words = "better than chance on the Teacher (AUC 0.530, 95 % interval [0.5003, 0.560])"
    assert words in verdict(audit, OF_RUN)
    rule = {"path": "x", "words": "x", "limit": 0.55, "value": 0.5502, "passed": False, "source": "default"}
    (_, (_, row)) = list(rules({"rules": [rule]}))[1]
    assert row == ["x", "0.550", "0.5502", "NO", "default"]


def test_a_lower_bound_is_not_rounded_up():
    assert [tables.rounded_down(value) for value in (0.0, 0.29, 0.106, 1.999, None)] == [
        "0.00", "0.29", "0.10", "1.99", "not measured",
    ]  # fmt: skip


def test_no_p_is_zero_or_at_the_limit_that_it_is_not():
    assert [tables.stated(p) for p in (0.2, 0.0496, 0.0504, 0.05, 0.0, None)] == [
        "p = 0.2", "p = 0.0496", "p = 0.0504", "p = 0.05", "p < 1e-300", "no variance",
    ]  # fmt: skip
    assert '<span class="unbroken">p &lt; 1e-300' in render.fragment([("text", "(p < 1e-300)")])
    pixels = {"members": 9, "held_out": 9, "synthetic": 9, "memorised": {"copies": None}}
    assert "(smallest corrected p < 1e-300)" in released.words({"pixels": pixels, "p": 0.0}, 0.95)


def test_two_recipes_without_variance_are_not_said_to_score_alike():
    audit = whole_audit()
    audit["leave_one_out"]["student_full"]["lira"] = recipe(0.5, 0.5, 0.5, difference=(0.5, 0.5))
    audit["leave_one_out"]["student_full"]["lira"]["difference"] |= {"p": None, "p_corrected": None}
    text = verdict(audit, OF_RUN)
    assert "cannot be compared: their difference has no variance" in text


def test_a_column_has_one_unit():
    audit = whole_audit(control=False)
    row = audit["leave_one_out"]["teacher"]["lira"]
    row["tpr_at_fpr"]["0.01"] = {"mean": 0.0567, "sd": 0.01, "each": [], "interval": [0.04, 0.07]}
    for name in audit["setting"]["targets"]:
        for each in audit[name].values():
            each["epsilon"] = {"clopper_pearson": 0.106}
    rows = audit_tables.headline(audit, OF_RUN)
    assert rows[0][3:] == ["TPR at 1 % FPR", "epsilon at least"]
    assert rows[1][3] == "5.67 % [4.00, 7.00] %"
    assert rows[3][3:] == ["5.00 % [2.00, 9.00] %, 12 false positives", "0.10"]
    assert audit_tables.leave_one_out(audit, "teacher")[1][-1] == "5.67 % [4.00, 7.00] % ± 1.00 %"
    assert audit_tables.leave_one_out(audit, "teacher")[2][-1] == "fewer than 10 false positives"
    released_row = audit_tables.targets({**audit, "setting": {**audit["setting"], "targets": {
        "released": audit["setting"]["targets"]["released"]}}})[1]  # fmt: skip
    assert released_row[1:] == ["the 1,024 released images themselves", "", "", ""]
