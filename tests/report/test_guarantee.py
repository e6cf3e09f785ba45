"""Epsilon of the ledger beside the audit's lower bounds, in the report and in metrics.json."""

import json
from types import SimpleNamespace

import pytest
from report_cases import arrays, summary

from kr_fast import report
from kr_fast.cli.run import finished
from kr_fast.report import guarantee
from kr_fast.report.exported import croissant, data_card, model_card
from kr_fast.report.sections import verdict
from kr_fast.report.tables import lower_bounds


def guaranteed(found=0.4, delta=1e-5, **changes):
    """The summary of a private run whose audit proves an epsilon of ``found`` of the Teacher."""
    values = summary()
    for name in values["audit"]["setting"]["targets"]:
        for row in values["audit"][name].values():
            bounds = {"clopper_pearson": 0.1, "gaussian": 0.25, "one_run": None, "gaussian_mu": 0.1}
            row["epsilon"] = {"delta": delta, "level": 0.95, **bounds}
    values["audit"]["teacher"]["lira"]["epsilon"]["clopper_pearson"] = found
    values["audit"]["control"]["lira"]["epsilon"]["clopper_pearson"] = 9.0  # trained without privacy: says nothing
    spent = [
        {"for": "Teacher", "mechanism": "gaussian", "steps": 100, "again": 0, "lost": 0, "epsilon_alone": 1.20005},
        {"for": "generator", "mechanism": "gaussian", "steps": 900, "again": 0, "lost": 0, "epsilon_alone": 1.3},
    ]
    facts = {"epsilon": 1.99999, "delta": 1e-5, "target_epsilon": 2.0, "records": 900, "private": True}
    facts |= {"not_private": None, "neighbouring": "add or remove one record", "sampling": "Poisson", "spent": spent}
    return {**values, "guarantee": {**facts, **changes}}


def test_ledger_and_bounds_stand_in_one_table(tmp_path):
    html, markdown = report.write(tmp_path, guaranteed(), arrays())
    for words in (
        "-differentially private (neighbouring sets: add or remove one record)",
        "everything released, by the ledger",
        "Teacher alone, by the ledger",
        "1.201",  # rounded up
        "at least (any threshold)",
        "Teacher (real images), by LiRA online",
        "released images, by nearest synthetic image",
    ):
        assert words in html.read_text(), words
        assert words in markdown.read_text(), words
    assert "An attack proves a larger epsilon" not in html.read_text()
    report.write(tmp_path / "plain", summary(), arrays())
    assert "by the ledger" not in (tmp_path / "plain" / "report.html").read_text()


def test_an_attack_that_proves_more_than_the_ledger_allows_stands_first(tmp_path):
    html, _ = report.write(tmp_path, guaranteed(found=2.1), arrays())
    assert (
        "An attack proves a larger epsilon than the ledger allows (Teacher (real images) by LiRA online)"
        in html.read_text()
    )
    metrics = json.loads(json.dumps(report.metrics(guaranteed(found=2.1)), allow_nan=False))
    entries = {(each["target"], each["attack"]): each for each in metrics["guarantee"]["lower_bounds"]}
    assert entries["teacher", "lira"]["above"] == ["clopper_pearson"]
    assert entries["student", "lira"] == {
        "target": "student", "attack": "lira", "delta": 1e-5, "level": 0.95, "clopper_pearson": 0.1, "one_run": None,
        "gaussian": 0.25, "above": [],
    }  # fmt: skip
    assert not any(target == "control" for target, _ in entries)
    assert f"in at most {5 * len(entries)} % of audits: take" in html.read_text()  # each bound errs in 5 %
    assert guarantee.SHIFTED.partition(":")[0] not in html.read_text()
    in_groups = guaranteed(found=2.1)
    in_groups["audit"]["by_group"] = {"groups": 9}
    assert "% of audits (in more where images are in groups" in guarantee.contradiction(in_groups)


def test_sides_that_differ_by_themselves_say_nothing_of_the_training(tmp_path):
    """Attacks tell a test split of another scanner from the members after any training, a private one too."""
    values = guaranteed(found=2.1)
    blind = {"auc": 0.8, "interval": [0.7, 0.9], "passed": False}
    values["audit"]["setting"]["negative_controls"] = {"blind": blind, "targets": {}}
    assert "Whether the training was as the ledger has it is not decided." in guarantee.contradiction(values)
    assert "release nothing" not in guarantee.contradiction(values)
    html, _ = report.write(tmp_path, values, arrays())
    assert html.read_text().count("members and the others differ by themselves, so the bounds may show") == 2


@pytest.mark.parametrize(
    ("changes", "decision", "words", "may"),
    [
        ({}, "not decided", "differentially private for every training image", True),
        ({}, "do not share", "release alone is what that holds for: the figures above are of real images", False),
        ({"found": 2.1}, "not decided", "An attack proves a larger epsilon than the ledger allows", False),
        ({"epsilon": None, "private": False, "not_private": "a seed was given"}, "share", "NOT PRIVATE: a seed", False),
    ],
)
def test_the_last_screen_of_a_run_lets_nothing_go_that_its_report_holds_back(
    capsys, tmp_path, changes, decision, words, may
):
    metrics = report.metrics(guaranteed(**changes, class_counts="noised"))
    metrics |= {"verdict": {"decision": decision, "reasons": [], "chance": 0.2, "rules": []}}
    finished(SimpleNamespace(metrics=metrics, out=tmp_path, report=tmp_path / "report.html"))
    shown = capsys.readouterr().out
    assert words in shown
    assert ("release alone may be handed on" in shown) == may


@pytest.mark.parametrize(("delta", "above"), [(1e-5, ["clopper_pearson"]), (1e-3, ["clopper_pearson"]), (1e-6, None)])
def test_bounds_at_a_smaller_delta_are_not_compared(tmp_path, delta, above):
    """Epsilon falls as delta rises, so a bound at a larger delta is below the ledger's epsilon all the more."""
    values = guaranteed(found=2.1, delta=delta)
    assert lower_bounds(values["guarantee"], values["audit"])[0]["above"] == above
    html, _ = report.write(tmp_path, values, arrays())
    assert ("at a smaller delta than the ledger" in html.read_text()) == (above is None)


def test_a_run_with_a_seed_guarantees_nothing(tmp_path):
    values = guaranteed(epsilon=None, private=False, not_private="a seed was given")
    html, _ = report.write(tmp_path, values, arrays())
    assert "Not private: a seed was given. Nothing is guaranteed." in html.read_text()
    assert "have a guarantee of differential privacy" not in html.read_text()
    without_audit = {**guaranteed(), "audit": None, "aop": None}
    assert report.metrics(without_audit)["guarantee"]["lower_bounds"] == []


def test_cards_of_a_run_with_a_seed_claim_no_privacy():
    seeded = {"private": False, "not_private": "a seed was given", "epsilon": None}
    for changes, claims in (({}, True), (seeded, False)):
        values = guaranteed(class_counts="noised", **changes)
        values["config"] |= {"epsilon": 2.0, "student_arch": "resnet8", "temperature": 4.0}
        files = [{"path": "train.npz", "bytes": 1, "sha256": ""}]
        facts = {"format": "npz", "count": 2, "shape": [8, 8, 1], "column": "soft_label", "files": files}
        facts["counts"] = [1] * len(values["dataset"]["class_names"])
        cards = [model_card.text(values, {}), data_card.text(values, facts)]
        for text in (*cards, croissant.metadata(values, facts)["description"]):
            assert ("NOT PRIVATE: a seed was given" in text) != claims
            assert ("with differential privacy" in text) == claims
        assert all(("- differential-privacy" in card) == claims for card in cards)
        assert all(("- not-private" in card) != claims for card in cards)
        assert ("guarantee covers its answers" in text) == claims


def test_the_last_line_of_a_verdict_says_what_is_guaranteed():
    decided = {"decision": "share", "reasons": ["No attack finds members."], "about": "the Student", "chance": None}
    plain, private, seeded = (
        verdict.lines(decided, each)[-1]
        for each in (
            None,
            guaranteed()["guarantee"],
            guaranteed(private=False, not_private="a seed was given")["guarantee"],
        )
    )
    about = "The verdict is about the Student. What is measured is empirical"
    assert all(line.startswith(about) for line in (plain, private, seeded))
    assert plain.endswith(" and no guarantee, as differential privacy would be.")
    assert "no guarantee" not in private
    assert "what is released is (2, 1e-05)-differentially private, which holds against every attack." in private
    assert seeded.endswith(", and nothing is guaranteed: a seed was given.")
