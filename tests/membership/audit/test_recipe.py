"""Figures of a recipe: their intervals by definition and by simulation, and differences of two recipes in pairs."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from audit_cases import averages, data, left_out
from scipy.stats import t

from kr_fast.membership import (
    AuditData,
    Choices,
    ShadowSignals,
    TargetSignals,
    across_targets,
    audit_signals,
    base,
    lira,
    partners,
)
from kr_fast.membership.audit.notes import few_examples
from kr_fast.membership.audit.recipe import Estimates, recipes
from kr_fast.membership.statistics.groups import Groups


def compare(first, second):
    """The paired test of two recipes with one attack."""
    return recipes({"first": {"lira": first}, "second": {"lira": second}}, "lira", 0.95)["second"]["lira"]["difference"]


def keep_of(models, count, generator):
    return torch.rand(models, count, generator=generator).argsort(0) < models // 2


def null(seed, models=8, count=150, difficulty=2.0):
    """(phi, keep, partner) of shadows that memorised nothing."""
    generator = torch.Generator().manual_seed(seed)
    keep = keep_of(models, count, generator)
    phi = difficulty * torch.randn(1, count, 1, generator=generator) + torch.randn(
        1, count, models, generator=generator
    )
    return phi, keep, partners(keep, seed)


def test_one_target_alone_has_delongs_variance():
    scores, members = torch.randn(1, 90, generator=torch.Generator().manual_seed(0)), torch.arange(90) < 30
    pairs = (scores[0, members][:, None] > scores[0, ~members][None]).double().numpy()
    variance = pairs.mean(1).var(ddof=1) / 30 + pairs.mean(0).var(ddof=1) / 60
    low, high = across_targets(scores, members[None])["auc"]["interval"]
    mean, square = pairs.mean(), t.ppf(0.975, 89) ** 2
    for end in (low, high):  # Wilson: the mean lies t standard deviations from it, by a binomial's variance there
        assert (mean - end) ** 2 == pytest.approx(square * variance * end * (1 - end) / (mean * (1 - mean)), rel=1e-9)


def test_targets_whose_sides_do_not_overlap_have_the_interval_of_their_pairs():
    """Of one record, or one group, on a side an AUC of 1 is as likely as one of 0, so that it shows nothing."""
    keep = torch.tensor([[True, False], [False, True]])
    assert across_targets(keep.double(), keep)["auc"]["interval"] == pytest.approx([0.025, 1.0])
    assert across_targets(-keep.double(), keep)["auc"]["interval"] == pytest.approx([0.0, 0.975])
    many, groups = keep.repeat_interleave(40, 1), Groups.of(np.arange(80) // 40)
    for units, pairs in ((None, 40), (groups, 1)):
        row = recipes({"shadows": {"lira": (many.double(), many)}}, "lira", 0.95, units)["shadows"]["lira"]["auc"]
        assert row["interval"] == pytest.approx([0.025 ** (1 / pairs), 1.0])


def test_variances_are_those_of_their_definition():
    """Records as clusters over targets; the spread of models beyond what the records' own variances explain."""
    rng = np.random.default_rng(1)
    each, parts = rng.normal(0.6, 0.2, 5), rng.normal(size=(5, 40))
    (records, models), degrees = Estimates(each, parts).variances()
    assert records == pytest.approx(sum(np.mean(parts[:, n]) ** 2 for n in range(40)) / 1600)
    cross = parts @ parts.T / 1600
    within, shared = np.trace(cross) / 5, (cross.sum() - np.trace(cross)) / 20
    assert models == pytest.approx((each.var(ddof=1) - within + shared) / 5)
    assert degrees == [39, 4]
    assert Estimates(np.full(5, 0.6), parts).variances()[0][1] == 0


@pytest.mark.parametrize("models", [4, 8, 16])
def test_interval_of_a_mean_covers_one_half_where_shadows_are_exchangeable(models):
    """LiRA, BASE and the loss, whose examples differ in difficulty: 95 +- 2 % hold 0.5, none far fewer or far wider."""
    hits, trials, wide, means = {}, 100 if models < 16 else 60, {}, {}
    for seed in range(trials):
        phi, keep, partner = null(seed, models)
        for name, scores in {
            "lira": lira(phi, keep, variance="fixed", partner=partner),
            "base": base(phi, keep, partner=partner),
            "loss": phi[0].T,
        }.items():
            result = across_targets(scores, keep, fprs=())["auc"]
            low, high = result["interval"]
            hits[name] = hits.get(name, 0) + (low <= 0.5 <= high)
            wide.setdefault(name, []).append((high - low) / (2 * 1.96))
            means.setdefault(name, []).append(result["mean"])
    error = 3 * (0.93 * 0.07 / trials) ** 0.5
    for name, count in hits.items():
        assert 0.93 - error <= count / trials, name
        assert np.mean(wide[name]) < 1.8 * np.std(means[name]), name
    assert hits["lira"] / trials <= 0.97 + error


def test_models_that_differ_widen_the_interval():
    """Half of the models memorise and half do not: another eight models would have another mean."""
    generator = torch.Generator().manual_seed(3)
    keep = keep_of(8, 4000, generator)
    strength = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    scores = strength * keep + torch.randn(8, 4000, generator=generator)
    result = across_targets(scores, keep)["auc"]
    low, high = result["interval"]
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 7) * result["sd"] / 8**0.5, rel=0.15)
    same = across_targets(0.5 * keep + torch.randn(8, 4000, generator=generator), keep)["auc"]["interval"]
    assert same[1] - same[0] < (high - low) / 4


def test_interval_of_a_mean_tpr_covers_the_truth():
    """Gaussian scores with a shift: the true TPR at 5 % FPR is known."""
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = 1 - float(normal.cdf(normal.icdf(torch.tensor(0.95)) - 1.0))
    generator, hits, widths = torch.Generator().manual_seed(4), 0, []
    for _ in range(200):
        keep = keep_of(4, 500, generator)
        scores = keep + torch.randn(4, 500, generator=generator)
        low, high = across_targets(scores, keep, fprs=(0.05,))["tpr_at_fpr"]["0.05"]["interval"]
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits / 200 >= 0.92 - 3 * (0.92 * 0.08 / 200) ** 0.5
    assert np.mean(widths) < 0.2


def test_difference_of_recipes_in_pairs():
    """Of the same records and splits: the two AUCs' common part cancels. Other splits are no pairs."""
    rejected = 0
    for seed in range(80):
        phi, keep, partner = null(seed, 6)
        noise = torch.randn(phi.shape, generator=torch.Generator().manual_seed(1000 + seed))
        pair = [(lira(values, keep, variance="fixed", partner=partner), keep) for values in (phi, phi + noise)]
        result = compare(*pair)
        rejected += result["p"] < 0.05
        assert (result["p"] < 0.05) == (not result["interval"][0] <= 0 <= result["interval"][1])
    assert rejected / 80 <= 0.07 + 3 * (0.07 * 0.93 / 80) ** 0.5
    aucs = [across_targets(*each, fprs=())["auc"]["each"] for each in pair]
    assert result["difference"] == pytest.approx(np.mean(aucs[0]) - np.mean(aucs[1]))
    fewer = compare(pair[0], (pair[1][0][:4], keep[:4]))
    assert fewer["targets"] == 4
    assert fewer["difference"] == pytest.approx(np.mean(aucs[0][:4]) - np.mean(aucs[1][:4]))
    assert compare(pair[0], (pair[1][0], keep.flip(0))) is None


def test_recipes_share_out_their_error():
    generator = torch.Generator().manual_seed(5)
    keep = keep_of(6, 300, generator)
    lone = {
        name: {attack: (effect * keep + torch.randn(6, 300, generator=generator), keep) for attack in ("a", "b", "c")}
        for name, effect in (("teacher", 1.0), ("student", 0.2))
    }
    result = recipes(lone, "b", 0.95)
    assert [result["teacher"][name]["role"] for name in "abc"] == ["exploratory", "primary", "exploratory"]
    for name in "abc":
        expected = across_targets(*lone["teacher"][name], fprs=(), level=0.95 if name == "b" else 0.975)["auc"][
            "interval"
        ]
        assert result["teacher"][name]["auc"]["interval_corrected"] == expected
        assert result["teacher"][name]["difference"] is None
        gap = result["student"][name]["difference"]
        plain = compare(lone["teacher"][name], lone["student"][name])
        assert (gap["first"], gap["difference"], gap["p"]) == ("teacher", plain["difference"], plain["p"])
        assert (gap["interval"] == gap["interval_corrected"]) == (name == "b")
        assert gap["p_corrected"] >= gap["p"]


def test_audit_gives_the_recipes_figures_without_being_asked():
    """Where there are four shadows; each with its partner left out, as the operating points' thresholds are."""
    whole = data()
    report = audit_signals(whole, Choices(attacks=("lira", "loss"), seed=3))
    shadows = whole.shadows["shadows"]
    lone = lira(shadows.signals["phi"], shadows.keep, variance="fixed", partner=left_out(shadows, 3))
    assert averages(report.leave_one_out["shadows"]["lira"]) == across_targets(lone, shadows.keep)
    assert report.to_dict()["leave_one_out"]["shadows"]["lira"]["auc"]["interval"][0] > 0.5
    few = ShadowSignals(shadows.keep[:2], {"phi": shadows.signals["phi"][:, :, :2]})
    target = TargetSignals({"phi": whole.targets["target"].signals["phi"]})
    bare = audit_signals(AuditData({"shadows": few}, {"target": target}, whole.members), Choices(attacks=("loss",)))
    assert bare.leave_one_out == {}


def test_pairs_of_two_sets_in_an_audit():
    """Shadow Teachers, and shadow Students of the same splits that memorise less."""
    first, second = data(0, 1.5), data(0, 0.3)
    sets = {"teacher": first.shadows["shadows"], "student": second.shadows["shadows"]}
    targets = {
        "teacher": TargetSignals({"phi": first.targets["target"].signals["phi"]}, shadows="teacher"),
        "student": TargetSignals({"phi": second.targets["target"].signals["phi"]}, shadows="student"),
    }
    result = audit_signals(AuditData(sets, targets, first.members), Choices(attacks=("lira", "loss"))).leave_one_out
    gap = result["student"]["lira"]["difference"]
    assert gap["difference"] == pytest.approx(
        result["teacher"]["lira"]["auc"]["mean"] - result["student"]["lira"]["auc"]["mean"]
    )
    assert gap["p"] < 1e-6


def test_few_members_are_said_with_their_numbers(tmp_path):
    """Of 12 members: what the rank sum's variance gives, and a twelfth of the TPR; of 30 and more nothing."""
    whole = data()
    members = torch.arange(len(whole.members)) < 12
    report = audit_signals(dataclasses.replace(whole, members=members), Choices(attacks=("lira", "loss")))
    words = "12 members: an AUC between 0.33 and 0.67 is what chance gives with so few, in 95 % of cases"
    assert any(f"{words}; one of them is 8.33 % of the TPR" in line for line in report.warnings)
    assert words in re.sub("<[^<>]*>", "", report.write(tmp_path).read_text())
    assert not any("what chance gives" in line for line in audit_signals(whole, Choices(attacks=("lira",))).warnings)
    assert few_examples(29, 30)[0].startswith("29 members")
    assert few_examples(30, 1)[0].startswith("1 non-member: an AUC between 0.00 and 1.00")
    assert few_examples(30, 30) == []
