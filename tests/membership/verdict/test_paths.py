"""Figures of the JSON by their path: every one can be asked for, and one that does not exist is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from audit_cases import COUNT, with_population

from kr_fast.membership import Choices, Limits, TargetSignals, audit_signals
from kr_fast.membership.verdict.paths import OF_AUDIT, OF_RUN, SHORT, Names, check_paths, figures, known

NAMES = Names(("target", "other", "control"), ("shadows",), ("lira", "loss", "rmia"), (0.5, 0.1, 0.01))
DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def audit():
    """An audit with classes, groups, images, a second target and a control, as plain figures."""
    whole = with_population()
    same = whole.targets["target"]
    other = dataclasses.replace(same, kind="transfer", accuracy=0.8)
    control = TargetSignals({"phi": same.signals["phi"] + 1}, same.population, control=True)
    whole = dataclasses.replace(
        whole,
        targets={"target": same, "other": other, "control": control},
        labels=torch.arange(COUNT) % 3,
        groups=[str(index % 40) for index in range(COUNT)],
        images=torch.arange(COUNT * 64).reshape(COUNT, 8, 8, 1).to(torch.uint8),
    )
    return audit_signals(whole, Choices(attacks=("lira", "loss", "rmia"), random_members=True)).to_dict()


def test_every_figure_has_a_path(audit):
    values = figures(audit)
    assert len(values) > 1000
    check_paths("audit", [f"{path}=1" for path in values], NAMES)
    assert (
        values["target.lira.tpr_at_fpr.0.01.interval.1"] == audit["target"]["lira"]["tpr_at_fpr"]["0.01"]["interval"][1]
    )
    assert values["records.shadows.classes.rows.2.records"] == COUNT // 3
    assert not any(path.startswith("verdict") for path in values)


def test_short_paths_are_the_figures_they_name(audit):
    values, row, of_all = figures(audit), audit["target"]["lira"], audit["leave_one_out"]["shadows"]["lira"]
    assert values["target.auc_high"] == row["auc_ci"][1]
    assert values["target.tpr_0.1"] == row["tpr_at_fpr"]["0.1"]["tpr"]
    assert values["target.epsilon"] == row["epsilon"]["clopper_pearson"]
    assert values["target.recipe_auc_low"] == of_all["auc"]["interval"][0]
    assert values["target.records"] == audit["records"]["shadows"]["found"] == values["shadows.records"]
    others = [each["auc_ci_corrected"] for each in audit["target"].values() if each["role"] == "exploratory"]
    assert values["target.others_auc_high"] == max([high for low, high in others if low > 0.5], default=0.5)
    assert values["target.shadows_missing"] == 2
    assert values["positive_controls_missed"] == 0
    for name in ("other", "control"):  # nothing was made as these were
        assert not {f"{name}.records", f"{name}.recipe_auc", f"{name}.shadows_missing"} & values.keys()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("targt.auc_high=0.5", "got targt.auc_high (nearest: target.auc_high, "),
        ("target.auc_hihg=0.5", "got target.auc_hihg (nearest: target.auc_high, "),
        ("target.lira.acu=0.5", "got target.lira.acu (nearest: target.lira.auc, "),
        ("target.lira.auc_ci.2=0.5", "got target.lira.auc_ci.2 (nearest: target.lira.auc_ci."),
        ("records.shadows.find=0", "got records.shadows.find (nearest: records.shadows.found, "),
        ("accuracy_gap=1", "name figures of the JSON (docs/audit/verdict.md), got accuracy_gap"),  # of a run only
        ("qqqqqqqq=1", "audit: fail_above must name figures of the JSON (docs/audit/verdict.md), got qqqqqqqq"),
    ],
)
def test_a_path_that_no_figure_has_is_refused(gate, words):
    with pytest.raises(ValueError, match="fail_above must name") as error:
        check_paths("audit", [gate], NAMES)
    assert words in str(error.value)


@pytest.mark.parametrize("gate", ["target.auc_high", "=0.5", "target.auc=nan", "target.auc=inf", "target.auc=x", ""])
def test_a_text_of_another_form_is_refused(gate):
    with pytest.raises(ValueError, match="audit: fail_above must be PATH=LIMIT with a finite number, such as"):
        Limits(fail_above=(gate,))


def test_limits_out_of_range_and_a_path_twice_are_refused():
    for limits, words in (
        ({"auc": 0.4}, r"audit: auc must be in \[0.5, 1\], got 0.4"),
        ({"records": -1}, "audit: records must be in \\[0, 1000000000\\], got -1"),
        ({"fail_above": ("a=1", "a=2")}, "audit: fail_above must hold each path once, got a"),
    ):
        with pytest.raises(ValueError, match=words):
            Limits(**limits)


def test_paths_are_refused_before_an_attack_runs():
    with pytest.raises(ValueError, match="nearest: target.auc"):
        audit_signals(with_population(), Choices(limits=Limits(fail_above=("target.acu=1",))))


def test_documents_name_every_short_path():
    text = (DOCS / "audit" / "verdict.md").read_text()
    missing = [name for name in (*SHORT, *OF_AUDIT, *OF_RUN) if f"`{name}`" not in text]
    assert not missing
    assert len(list(known(NAMES))) == len(set(known(NAMES)))
