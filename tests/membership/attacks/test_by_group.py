"""Membership by group: figures of group means, exact tests of single groups, and what of them is said."""

import csv
import io

import numpy as np
import pytest
import torch

from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.membership import AuditData, Choices, audit_signals, draw_canaries, negative_controls, record_risk, roc
from kr_fast.membership.attacks.by_group import as_csv, by_group, group_risk
from kr_fast.membership.audit.recipe import of_target
from kr_fast.membership.audit.record_table import unnamed
from kr_fast.membership.inputs.data import ShadowSignals, TargetSignals
from kr_fast.membership.statistics.groups import Groups
from kr_fast.report.sections import records
from kr_fast.runtime.errors import UserError

GROUPS, MODELS = 24, 16


def made(by=True, leak=2.0):
    """24 groups of 1 to 4 images, 16 shadows of whole groups; group 5 leaks in whatever held it."""
    draw = torch.Generator().manual_seed(0)
    groups = torch.arange(GROUPS).repeat_interleave(torch.arange(GROUPS) % 4 + 1)
    groups = groups[torch.randperm(len(groups), generator=draw)]
    keep = keep_matrix(MODELS, len(groups), 1, groups if by else None)
    members = groups % 2 == 0
    shift = leak * (1 + 4 * (groups == 5))

    def phi(inside):
        noise = torch.randn(*inside.shape, generator=draw, dtype=torch.float64)
        return noise + torch.randn(*inside.shape[:-1], GROUPS, generator=draw)[..., groups] + shift * inside

    shadows = ShadowSignals(keep, {"phi": phi(keep).T[None]})
    targets = {"target": TargetSignals({"phi": phi(members)[None]})}
    names = np.array([f"patient {number:02}" for number in groups.tolist()])
    return AuditData({"shadows": shadows}, targets, members, groups=names), groups


def test_figures_are_those_of_group_means():
    data, groups = made()
    report = audit_signals(data, Choices(attacks=("lira", "loss")))
    found = report.to_dict()["by_group"]
    assert found["groups"] == GROUPS
    assert (found["members"], found["non_members"], found["mixed"]) == (12, 12, 0)
    assert found["images_in_largest"] == 4
    scores = report.scores["target"]["lira"]
    mean = torch.stack([scores[groups == number].mean() for number in range(GROUPS)])
    curve = roc(mean, torch.arange(GROUPS) % 2 == 0)
    row = found["targets"]["target"]
    assert (row["attack"], row["auc"]) == ("lira", curve.auc)
    assert row["auc_ci"] == pytest.approx(curve.auc_interval(0.95))
    phi = data.shadows["shadows"].signals["phi"][0].T
    mean = torch.stack([phi[:, groups == number].mean(1) for number in range(GROUPS)], 1)
    first = [int((groups == number).nonzero()[0]) for number in range(GROUPS)]
    expected = record_risk(mean, data.shadows["shadows"].keep[:, first])
    risk = report.group_risks["shadows"]
    assert np.allclose(risk.p, expected.p)
    assert np.allclose(risk.advantage, expected.advantage)
    assert found["records"]["shadows"]["tested"] == GROUPS
    assert found["records"]["shadows"]["found"] >= 1
    assert found["recipes"]["shadows"]["auc"]["mean"] > 0.8
    rows = list(csv.DictReader(io.StringIO(as_csv(data, report.group_risks))))
    assert len(rows) == GROUPS
    assert float(rows[0]["p"]) == pytest.approx(risk.p.min())
    assert {row["group"]: int(row["images"]) for row in rows}["patient 07"] == 4
    paths = [rule["path"] for rule in report.verdict["rules"]]
    assert {f"by_group.{each}" for each in ("targets.target.auc_ci.1", "records.shadows.found")} < set(paths)
    alone = audit_signals(AuditData(data.shadows, data.targets, data.members), Choices(attacks=("lira", "loss")))
    for attack in ("lira", "loss"):
        mine, other = (each.figures["target"][attack] for each in (report, alone))
        assert mine["auc"] == other["auc"]
        for key in ("auc_ci", "auc_ci_corrected"):
            assert mine[key][0] <= other[key][0] <= other[key][1] <= mine[key][1]
        mine, other = (each.leave_one_out["shadows"][attack]["auc"] for each in (report, alone))
        assert mine["mean"] == other["mean"]
        assert mine["interval"] != other["interval"]
    words = records.words(report.to_dict())
    assert words.startswith("The images are of 24 groups")
    assert "24 groups are found" in words
    assert [line[2:4] for line in records.table(report.to_dict())[1:]] == [["12", "12"], ["", ""]]
    assert "patient" not in str(found)
    assert unnamed(report.records)["shadows"].figures["groups"] == {
        **report.records["shadows"].figures["groups"],
        "rows": [],
    }


def test_parts_of_groups_are_left_out():
    """Two mixed groups; shadows that were drawn by image test no group."""
    data, groups = made(by=False)
    members = data.members.clone()
    for number in (3, 7):
        members[(groups == number).nonzero()[0]] = True
    data = AuditData(data.shadows, data.targets, members, groups=data.groups)
    report = audit_signals(data, Choices(attacks=("lira",)))
    found = report.to_dict()["by_group"]
    assert (found["members"], found["non_members"], found["mixed"]) == (12, 10, 2)
    assert found["records"] == {}
    assert found["recipes"] == {}
    assert not report.group_risks
    assert "shadows were trained on parts of groups" in records.words(report.to_dict())


def test_without_members_only_groups_of_shadows_are_tested():
    data, _ = made()
    data = AuditData(data.shadows, {}, None, groups=data.groups)
    report = audit_signals(data, Choices(attacks=("lira",), targets="shadows"))
    found = report.to_dict()["by_group"]
    assert found["members"] is None
    assert found["targets"] == {}
    assert found["records"]["shadows"]["tested"] == GROUPS


def test_intervals_by_group_cover_where_those_over_images_do_not():
    """40 groups of 10 images that share what they score, without leakage: 200 audits."""
    draw = torch.Generator().manual_seed(3)
    groups = Groups.of(torch.arange(40).repeat_interleave(10))
    inside = torch.arange(40) % 2 == 0
    covered = {"images": 0, "groups": 0, "images, by group": 0}
    for _ in range(200):
        scores = torch.randn(40, generator=draw)[groups.at] + torch.randn(400, generator=draw)
        for name, curve in (("images", roc(scores, inside[groups.at])), ("groups", roc(groups.mean(scores), inside))):
            low, high = curve.auc_interval(0.95)
            covered[name] += low <= 0.5 <= high
            if name == "images":
                low, high = of_target(curve, scores, inside[groups.at], groups).interval(0.95)
                covered["images, by group"] += low <= 0.5 <= high
    assert covered["images, by group"] >= 182
    assert covered["groups"] >= 182  # 95 % of 200 less 2.6 standard deviations
    assert covered["images"] < 140


def test_by_group_of_an_infinite_signal():
    data, _ = made()
    data.shadows["shadows"].signals["phi"][0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    assert not np.isnan(group_risk(data)["shadows"].p).any()
    assert by_group(data, {}, {}, {}, {}, "lira", 0.95)["records"] == {}


def test_no_two_canaries_are_of_one_group():
    groups = torch.arange(300) // 6
    options = {"models": 4, "classes": 2, "seed": 0}
    index = draw_canaries(torch.arange(300) % 2, 30, groups=groups, **options).index
    assert len(groups[index].unique()) == 30
    assert not torch.equal(index, draw_canaries(torch.arange(300) % 2, 30, **options).index)
    with pytest.raises(UserError, match="^draw_canaries: count must be at most 25, the number of groups, got 30"):
        draw_canaries(torch.arange(300) % 2, 30, groups=groups // 2, **options)


def test_the_blind_attack_does_not_know_an_image_by_its_group():
    """60 patients of 6 images that are nearly the same, members by chance: over images it knows every patient."""
    draw = torch.Generator().manual_seed(0)
    patients = torch.randint(0, 226, (60, 8, 8, 1), generator=draw)
    groups = torch.arange(360) // 6
    images = (patients[groups] + torch.randint(0, 30, (360, 8, 8, 1), generator=draw)).to(torch.uint8)
    inside = torch.randperm(60, generator=draw) < 30
    scores = {"target": torch.randn(60, generator=draw)[groups]}
    over_images = negative_controls(images, inside[groups], scores)
    assert not over_images["blind"]["passed"]
    by_group = negative_controls(images, inside[groups], scores, groups=groups)
    assert by_group["blind"]["passed"]
    assert by_group["targets"]["target"]["members"]["passed"]
    few = negative_controls(images[:90], inside[groups[:90]], {}, groups=groups[:90])  # of 15 patients
    assert few["blind"] is None
