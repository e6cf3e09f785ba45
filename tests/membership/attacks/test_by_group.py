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
from kr_fast.membership.statistics.auc_intervals import t_interval
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


@pytest.mark.parametrize(("few", "many"), [(1, 20), (3, 40), (10, 30)])
def test_few_groups_on_a_side_widen_the_intervals_over_images(few, many):
    """Groups of 10 images that share what they score, without leakage: above chance in about 2.5 % of audits.

    With as many degrees of freedom as groups, 9 % of 3 beside 40 are, and 24 % of paired tests reject at 5 %.
    """
    draw = torch.Generator().manual_seed(few)
    count, above, told = few + many, 0, 0
    groups = Groups.of(torch.arange(count).repeat_interleave(10))
    inside = groups.at < few
    for _ in range(200):
        scores = torch.randn(2, count, generator=draw)[:, groups.at] + torch.randn(2, 10 * count, generator=draw)
        one, two = (of_target(roc(each, inside), each, inside, groups) for each in scores)
        above += one.interval(0.95)[0] > 0.5
        gap = one - two
        told += t_interval(gap.mean, *gap.variances(), 0.95)["p"] < 0.05
    assert above <= 11  # 2.5 % of 200 and 2.7 standard deviations
    assert told <= 17


def test_no_overlap_of_few_groups_counts_groups():
    groups, inside = Groups.of(torch.arange(12).repeat_interleave(50)), torch.arange(600) < 150
    scores = inside.double() + torch.rand(600, generator=torch.Generator().manual_seed(0)) / 2
    low, high = of_target(roc(scores, inside), scores, inside, groups).interval(0.95)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 3)), 1.0)


def test_images_of_one_group_on_both_sides_are_one_unit():
    """The variance of the definition: squared sums of groups, a group on both sides with its sum over both."""
    draw = torch.Generator().manual_seed(2)
    groups, inside = Groups.of(torch.arange(60) // 3), torch.rand(60, generator=draw) < 0.5
    scores = torch.randn(60, generator=draw)
    curve = roc(scores, inside)
    parts, degrees = of_target(curve, scores, inside, groups).variances()
    placed = (scores[:, None] > scores).double()
    gap = torch.where(inside, placed[:, ~inside].mean(1) - curve.auc, 1 - placed[:, inside].mean(1) - curve.auc)
    gap /= torch.where(inside, inside.sum(), (~inside).sum())
    sides = [torch.zeros(20, dtype=torch.float64).index_add(0, groups.at, gap * side) for side in (inside, ~inside)]
    squares = [float(side.square().sum()) for side in sides]
    counts = [len(groups.at[side].unique()) for side in (inside, ~inside)]
    whole = float((sides[0] + sides[1]).square().sum()) / sum(squares)
    assert parts == pytest.approx([s * whole * k / (k - 1) for s, k in zip(squares, counts, strict=True)])
    assert degrees == [min(counts) - 1] * 2


def test_the_loss_of_certain_answers_has_group_means_and_thresholds():
    data, groups = made()
    certain = (groups == int(groups.mode().values)).nonzero()[:, 0]
    for signals in (data.shadows["shadows"].signals, data.targets["target"].signals):
        signals["phi"][:, certain[0]], signals["phi"][:, certain[1]] = torch.inf, -torch.inf
    report = audit_signals(data, Choices(attacks=("loss",)))
    assert report.figures["target"]["loss"]["operating_points"]["0.01"]["fpr"] <= 1


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
