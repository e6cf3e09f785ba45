"""Options of the audit: they reach the attacks and the report, and bad ones are refused before a signal is read."""

import dataclasses

import pytest
import torch
from audit_cases import COUNT, MODELS, averages, data, left_out, with_population

from kr_fast.membership import (
    Choices,
    ShadowSignals,
    TargetSignals,
    across_targets,
    audit_signals,
    epsilon_one_run,
    rmia_attack,
)


def test_options_of_rmia_reach_the_attacks_and_the_report(tmp_path):
    whole = with_population()
    shadows, target = whole.shadows["shadows"], whole.targets["target"]
    report = audit_signals(
        whole, Choices(attacks=("rmia", "rmia_offline"), targets="shadows", rmia_gamma=1.4, rmia_offline_a=0.7)
    )
    assert report.setting["rmia"] == {"gamma": 1.4, "offline_a": 0.7, "predicate": "ratio"}
    given = (shadows.signals["phi"], shadows.keep, shadows.population)
    outside = {"target": target.signals["phi"][:, :, None], "target_population": target.population[:, :, None]}
    for name, a in (("rmia", None), ("rmia_offline", 0.7)):
        expected = rmia_attack(*given, gamma=1.4, offline_a=a, **outside)[0]
        assert torch.equal(report.scores["target"][name], expected)
        lone = rmia_attack(*given, gamma=1.4, offline_a=a, partner=left_out(shadows))
        assert averages(report.leave_one_out["shadows"][name]) == across_targets(lone, shadows.keep)
    text = report.write(tmp_path).read_text()
    assert "RMIA: gamma = 1.4, offline a = 0.7, predicate ratio." in text
    assert "RMIA offline (a = 0.7)" in text


def test_predicate_of_rmia_decides_ties():
    """Examples and population of one value: at or above is all of them, strictly above none."""
    whole = with_population()
    models = torch.zeros(1, COUNT, MODELS)
    shadows = ShadowSignals(whole.shadows["shadows"].keep, {"phi": models}, models[:, :50])
    target = TargetSignals({"phi": models[:, :, 0]}, models[:, :50, 0])
    whole = dataclasses.replace(whole, shadows={"shadows": shadows}, targets={"target": target})
    for predicate, count in (("ratio", 50), ("ratio_strict", 0)):
        report = audit_signals(whole, Choices(attacks=("rmia",), rmia_predicate=predicate))
        assert (report.scores["target"]["rmia"].floor() == count).all()
        assert report.setting["rmia"]["predicate"] == predicate


def test_coins_are_those_of_the_examples_under_attack():
    """The one-run bound is that of members and non-members; the report says what it takes for granted."""
    whole = data()
    report = audit_signals(whole, Choices(attacks=("lira",), random_members=True))
    row = report.figures["target"]["lira"]
    expected = epsilon_one_run(report.scores["target"]["lira"], whole.members, delta=1e-5)
    assert row["epsilon"]["one_run"] == expected > 0
    assert any(f"each of these {COUNT} examples to have become a member by a fair coin" in n for n in notes(report))
    plain = audit_signals(whole, Choices(attacks=("lira",)))
    assert plain.figures["target"]["lira"]["epsilon"]["one_run"] is None
    assert not any("coin" in note for note in notes(plain))
    with pytest.raises(ValueError, match=f"audit: members must be about half of the examples.*, got 60 of {COUNT}"):
        audit_signals(dataclasses.replace(whole, members=torch.arange(COUNT) < 60), Choices(random_members=True))


def notes(report):
    return report.setting["notes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rmia_gamma": 0.0}, r"rmia_gamma must be in \(0, 1000\], got 0.0"),
        ({"rmia_gamma": float("nan")}, r"rmia_gamma must be in \(0, 1000\], got nan"),
        ({"rmia_offline_a": 1.5}, r"rmia_offline_a must be in \[0, 1\], got 1.5"),
        ({"rmia_predicate": "both"}, "rmia_predicate must be one of ratio, ratio_strict, reciprocal, got both"),
        (
            {"rmia_gamma": 2.0, "attacks": ("loss",)},
            "rmia_gamma must be left out without rmia or rmia_offline, where it does nothing, got 2.0",
        ),
        (
            {"rmia_offline_a": 0.5, "attacks": ("rmia",)},
            "rmia_offline_a must be left out without rmia_offline, where it does nothing, got 0.5",
        ),
    ],
)
def test_bad_options_of_rmia(options, words):
    with pytest.raises(ValueError, match=f"audit: {words}"):
        audit_signals(with_population(), Choices(**{"attacks": ("rmia", "rmia_offline"), **options}))
