"""The verdict: each rule by itself, a leak that no average shows, and how often chance alone says do not share."""

import copy

import pytest
import torch

from kr_fast.membership import AuditData, Choices, Limits, ShadowSignals, TargetSignals, audit_signals
from kr_fast.membership.verdict.decision import decide, fails, verdict_of
from kr_fast.membership.verdict.rules import Rule

INSIDE = [0.48, 0.54]  # of chance and of the limit
SHOWN, WIDE, SMALL, BELOW = [0.56, 0.62], [0.45, 0.58], [0.51, 0.53], [0.38, 0.44]


def attack(pair, role="primary"):
    return {"role": role, "auc": sum(pair) / 2, "auc_ci": pair, "auc_ci_corrected": pair}


def recipe(pair, role="primary"):
    auc = {"mean": 0.5 if pair is None else sum(pair) / 2, "interval": pair, "interval_corrected": pair}
    return {"role": role, "targets": 16, "auc": auc}


def plain():
    """The figures of an audit in which nothing leaks, as ``audit.json`` has them: those that the rules read."""
    facts = {"kind": "full", "shadows": "shadows", "control": False, "primary": "lira", "title": "the model"}
    records = {"rate": 0.1, "power": 0.8, "records": 90, "tested": 90, "untested": 0, "found": 0}
    half = {"auc": 0.5, "passed": True}
    setting = {
        "level": 0.95,
        "targets": {"target": facts, "control": {**facts, "control": True, "primary": "loss"}},
        "shadow_sets": {"shadows": {"on_the_smaller_side": 8}},
        "control": {"name": "control", "found": True, "by": ["loss"], "by_primary": True},
        "least_leak": {"shadows": {"attack": "lira", "draws": 20, "power": 0.8, "auc": 0.6}},
        "negative_controls": {"blind": half, "targets": {"target": {"members": half, "non_members": None}}},
        "attacks": {"lira": {"title": "LiRA"}, "loss": {"title": "loss"}},
    }
    return {
        "target": {"lira": attack(INSIDE), "loss": attack(INSIDE, "exploratory")},
        "control": {"lira": attack(INSIDE), "loss": attack(SHOWN)},
        "leave_one_out": {"shadows": {"lira": recipe(INSIDE), "loss": recipe(INSIDE, "exploratory")}},
        "records": {"shadows": {**records, "least_advantage": 0.7}},
        "setting": setting,
    }


def put(path, value):
    """An audit with another value there."""
    audit = copy.deepcopy(plain())
    *way, last = path.split("/")
    inner = audit
    for key in way:
        inner = inner[key]
    inner[last] = value
    return audit


FAILED, RECORDS, CONTROL = "setting/negative_controls/blind/passed", "records/shadows", "setting/control"
LEAST = "setting/least_leak/shadows/auc"
CASES = {
    "nothing leaks": ("setting/level", 0.95, "share", "detected by loss (AUC 0.590 [0.560, 0.620]), named"),
    "leak of the model": ("target/lira", attack(SHOWN), "do not share", "LiRA on the model tells members"),
    "leak by another attack": ("target/loss", attack(SHOWN, "exploratory"), "do not share", "Other attacks on the"),
    "leak of the recipe": ("leave_one_out/shadows/lira", recipe(SHOWN), "do not share", "averaged over 16 models"),
    "by another one": ("leave_one_out/shadows/loss", recipe(SHOWN, "exploratory"), "do not share", "Other attacks, av"),
    "leak within the limit": ("target/lira", attack(SMALL), "share", "is above chance and within the limit"),
    "too wide": ("target/lira", attack(WIDE), "not decided", "the interval is too wide for the limit of 0.55"),
    "below chance": ("target/lira", attack(BELOW), "not decided", "points to a shift"),
    "recipe without spread": ("leave_one_out/shadows/lira", recipe(None), "not decided", "shows nothing either way"),
    "one record": (f"{RECORDS}/found", 1, "do not share", "1 of 90 records is found"),
    "no power for records": (f"{RECORDS}/least_advantage", None, "not decided", "so few models cannot find one"),
    "records untested": (f"{RECORDS}/tested", 0, "not decided", "none has 4 shadows on each side"),
    "some records untested": (f"{RECORDS}/untested", 3, "not decided", "3 more, with fewer than 4 shadows on a side"),
    "negative control": (FAILED, False, "not decided", "A negative control failed: an attack that sees no model"),
    "no positive control": (CONTROL, None, "not decided", "There was no positive control"),
    "missed": (f"{CONTROL}/by_primary", False, "not decided", "detected only by loss: loss, named beforehand"),
    "small leaks unseen": (LEAST, 0.66, "not decided", "finds only those from AUC 0.66 on with probability 0.8"),
    "every leak unseen": (LEAST, None, "not decided", "LiRA finds none with probability 0.8"),
    "few shadows": ("setting/shadow_sets/shadows/on_the_smaller_side", 7, "not decided", "A record has 7 shadows"),
    "one shadow": ("setting/shadow_sets/shadows/on_the_smaller_side", 1, "not decided", "A record has 1 shadow on"),
    "transfer": ("setting/targets/target/kind", "transfer", "not decided", "bound its leakage from below"),
    "without shadows": ("setting/targets/target/shadows", None, "not decided", "without shadow models"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rule_decides(case):
    path, value, decision, words = CASES[case]
    result = verdict_of(put(path, value), Limits())
    assert result["decision"] == decision
    assert any(words in reason for reason in result["reasons"]), result["reasons"]
    broken = [rule for rule in result["rules"] if rule["passed"] is not True]
    assert (decision == "share") == (not broken)
    if broken:  # and nothing that was passed is a reason
        assert result["reasons"] == [rule["words"] for rule in broken]
    assert all(rule["source"] == "default" for rule in result["rules"])


def test_released_images_that_are_nearer_to_members_decide():
    """In ``kr-fast audit`` they are under attack too; shadows say nothing of them."""
    pixels = {"held_out": 40, "members": 50, "synthetic": 30, "memorised": {"copies": None}}
    for p, decision in ((0.04, "do not share"), (0.06, "share")):
        audit = put("setting/targets/images", {"kind": "released", "control": False, "primary": "loss", "title": ""})
        audit |= {"images": {"loss": attack(INSIDE)}, "released_tests": {"images": {"pixels": pixels, "p": p}}}
        result = verdict_of(audit, Limits())
        assert result["decision"] == decision
        assert result["rules"][-1]["path"] == "images.nearer"
        assert result["rules"][-1]["value"] == pytest.approx(1 - p)
        assert result["chance"] == pytest.approx(0.2 + 0.025 + 0.05)


def test_canaries_prove_power_in_place_of_an_overfitted_model():
    row = {"auc": 0.9, "auc_ci": [0.8, 0.95], "own": {"auc": 0.5, "auc_ci": INSIDE}}
    audit = put(f"{CONTROL}/by_primary", False)
    for power, decision, words in (
        (True, "share", "are found above its own members"),
        (False, "not decided", "no proof that these"),
    ):
        result = verdict_of({**audit, "canaries": {"power": power, "teacher": row}}, Limits())
        assert result["decision"] == decision
        assert any(words in reason for reason in result["reasons"])


@pytest.mark.parametrize(
    ("pair", "decision", "words"),
    [
        ([0.86, 0.99], "not decided", "records that a training memorises most, are found in twins of the Student"),
        ([0.38, 0.69], "share", "are not seen to be found in twins of the Student (AUC 0.535 [0.380, 0.690])"),
    ],
)
def test_canaries_that_the_student_knows_rule_share_out(pair, decision, words):
    row = {"auc": sum(pair) / 2, "auc_ci": pair, "own": {"auc": 0.5, "auc_ci": INSIDE}}
    result = verdict_of({**plain(), "canaries": {"power": True, "teacher": row, "student": row}}, Limits())
    assert result["decision"] == decision
    assert any(words in reason for reason in result["reasons"])


def test_limits_are_what_was_given():
    """Each makes another decision of the same figures."""
    leaks = put("target/lira", attack(SHOWN))
    assert verdict_of(leaks, Limits(auc=0.62))["decision"] == "share"
    assert verdict_of(put(f"{RECORDS}/found", 3), Limits(records=3))["decision"] == "share"
    assert verdict_of(put(CONTROL, None), Limits(controls=False))["decision"] == "share"
    assert verdict_of(put(FAILED, False), Limits(controls=False))["decision"] == "share"


def test_what_comes_first_where_several_rules_are_broken():
    leaks, missed = put("target/lira", attack(SHOWN)), put(f"{CONTROL}/by_primary", False)
    missed["target"] = leaks["target"]  # a leak that is seen needs no proof of power
    assert verdict_of(missed, Limits())["decision"] == "do not share"
    leaks["setting"]["negative_controls"]["blind"]["passed"] = False
    result = verdict_of(leaks, Limits())
    assert result["decision"] == "not decided"
    assert [reason[:18] for reason in result["reasons"]] == ["A negative control", "LiRA on the model "]
    assert decide([])["decision"] == "not decided"


def test_the_stated_chance_is_the_sum_over_rules():
    """Four AUCs at one end of 95 %, and the false discovery rate; a rule without a figure cannot say it by chance."""
    assert verdict_of(plain(), Limits())["chance"] == pytest.approx(4 * 0.025 + 0.1)
    assert verdict_of(put(f"{RECORDS}/tested", 0), Limits())["chance"] == pytest.approx(4 * 0.025)
    assert verdict_of(put("setting/level", 0.9), Limits())["chance"] == pytest.approx(4 * 0.05 + 0.1)
    assert decide([Rule("a", 0, 1, False, "", True, 0.7)] * 2)["chance"] == 1


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ("target.auc_high=0.54", 0.54, True),  # a limit may be reached
        ("target.auc_high=0.53", 0.54, False),
        ("target.lira.auc_ci.0=0.2", 0.48, False),
        ("target.records=0", 0, True),
        ("target.recipe_auc=0.6", 0.51, True),
        ("negative_controls_failed=0", 0, True),
        ("target.epsilon=100", None, False),  # not computed here
        ("setting.negative_controls.targets.target.non_members.auc=1", None, False),
    ],
)
def test_rules_that_are_asked_for(gate, value, passed):
    result = verdict_of(plain(), Limits(fail_above=(gate,)))
    *_, rule = result["rules"]
    assert {key: rule[key] for key in ("path", "source", "value", "passed")} == {
        "path": gate.partition("=")[0],
        "source": "asked",
        "value": pytest.approx(value) if value else value,
        "passed": passed,
    }
    assert fails(result) == (not passed)
    assert result["decision"] == ("share" if passed else "not decided")
    assert not fails(verdict_of(put("target/lira", attack(SHOWN)), Limits()))  # nobody asked


def test_records_that_were_not_tested_pass_no_limit():
    result = verdict_of(put(f"{RECORDS}/tested", 0), Limits(fail_above=("target.records=0",)))
    assert result["rules"][-1]["value"] is None
    assert fails(result)


def simulated(seed, count, models, shift=0.0):
    """An audit of models that know nothing of their records, but for the first: ``shift`` higher where it was held."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(models, count, generator=generator).argsort(0) < models // 2
    members = torch.rand(count, generator=generator) < 0.5
    phi = 2 * torch.randn(count, 1, generator=generator) + torch.randn(count, models + 1, generator=generator)
    phi[0] += shift * torch.cat([keep[:, 0], members[:1]])
    shadows = ShadowSignals(keep, {"phi": phi[None, :, :models]})
    data = AuditData({"shadows": shadows}, {"target": TargetSignals({"phi": phi[None, :, models]})}, members)
    return audit_signals(data, Choices(attacks=("lira", "loss")))


def test_one_leaking_record_decides_where_the_average_shows_nothing():
    """3 standard deviations in the answers of 32 of 64 shadows, among 1,000 records."""
    report = simulated(0, 1000, 64, shift=3.0)
    mean = report.to_dict()["leave_one_out"]["shadows"]["lira"]["auc"]["mean"]
    assert abs(mean - 0.5) < 0.01
    assert report.verdict["decision"] == "do not share"
    first, *_ = report.verdict["reasons"]
    assert first.startswith("1 of 1,000 records is found")
    assert f"members as a whole are not told from non-members (AUC {mean:.3f}" in first


def test_chance_alone_seldom_says_do_not_share():
    """With the stated 20 %, more than 15 of 40 null audits say so with a probability of 0.3 %."""
    verdicts = [simulated(seed, 60, 12).verdict for seed in range(40)]
    assert {each["chance"] for each in verdicts} == {0.2}
    assert sum(each["decision"] == "do not share" for each in verdicts) <= 15
