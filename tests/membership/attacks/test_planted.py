"""How small a leak would have been seen, and a positive control that is surer of everything than its shadows."""

import dataclasses

import pytest
import torch

from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.membership import AuditData, Choices, ShadowSignals, TargetSignals, audit_signals, lira, roc
from kr_fast.membership.attacks.catalog import CATALOG, offline_form
from kr_fast.membership.attacks.planted import SIZES, least_leak
from kr_fast.membership.statistics.intervals import normal_quantile


def answers(models, count, leak, seed):
    """Normal phi of shadows and of one target more, centres far apart; ``leak``: in standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    centre, spread = 3 * torch.randn(count, 1, generator=generator), 0.5 + torch.rand(count, 1, generator=generator)
    keep = torch.cat([keep_matrix(models, count, seed), torch.rand(1, count, generator=generator) < 0.5])
    noise = torch.randn(count, models + 1, generator=generator)
    return (centre + spread * (noise + leak * keep.T))[None].double(), keep


def scene(models=16, count=300, leak=0.0, seed=0):
    phi, keep = answers(models, count, leak, seed)
    target = TargetSignals({"phi": phi[:, :, -1]})
    return AuditData({"shadows": ShadowSignals(keep[:-1], {"phi": phi[:, :, :-1]})}, {"target": target}, keep[-1])


def least(data, attack="lira", **changes):
    shadows = dataclasses.replace(data.shadows["shadows"], **changes)
    return least_leak(data, shadows, CATALOG[attack], level=0.95, seed=0)


def share_found(size, models=16, count=300):
    """Of 40 audits of models that leak so much, those in which LiRA's interval lies above 0.5."""
    found = 0
    for seed in range(40):
        phi, keep = answers(models, count, 2**0.5 * normal_quantile(size), 100 + seed)
        score = lira(phi[:, :, :-1], keep[:-1], variance="fixed", target=phi[:, :, -1:])[0]
        found += roc(score, keep[-1]).auc_interval()[0] > 0.5
    return found / 40


def test_the_least_leak_is_found_about_as_often_as_said():
    """In fresh models that leak as much, and of a smaller leak less often; 20 draws tell 0.8 from 0.55."""
    row = least(scene())
    assert (row["draws"], row["power"]) == (20, 0.8)
    assert 0.6 <= row["auc"] <= 0.7
    assert share_found(row["auc"]) > 0.6
    assert share_found(row["auc"] - 0.06) < 0.65


def test_what_the_models_leak_themselves_does_not_show():
    """It is taken out: the answer is about planted leaks, of a recipe that leaks as of one that does not."""
    assert least(scene(leak=3.0))["auc"] == pytest.approx(least(scene())["auc"], abs=0.021)


def test_where_a_record_stands_does_not_show():
    """As of all figures that may leave."""
    data, order = scene(count=60), torch.randperm(60, generator=torch.Generator().manual_seed(5))
    shadows = data.shadows["shadows"]
    moved = {"keep": shadows.keep[:, order], "signals": {"phi": shadows.signals["phi"][:, order]}}
    assert all(least(data, name) == least(data, name, **moved) for name in ("lira", "loss"))


def test_more_models_or_records_show_smaller_leaks():
    few, plain = least(scene(count=60)), least(scene())
    assert few["auc"] is None or few["auc"] > plain["auc"]
    assert least(scene(models=6, count=10))["auc"] is None
    assert least(scene(models=64))["auc"] < plain["auc"]
    assert plain["auc"] in SIZES


def test_where_it_cannot_be_told():
    data = scene(models=8, count=40)
    endless = data.shadows["shadows"].signals["phi"].clone()
    endless[0, 0, 0] = torch.inf
    assert least(data, "quantile_regression") is None  # trains a model each time
    assert least(data, "rmia") is None  # without a population
    assert least(data, signals={"phi": endless}) is None
    assert least(scene(models=4)) is None
    assert least(dataclasses.replace(data, groups=[str(at // 2) for at in range(40)])) is None


def test_a_control_that_is_surer_of_every_record_is_found():
    """Online LiRA takes it for a member of all of which shadows happened to be surer with them than without."""
    data, excess = scene(leak=0.2, seed=3), torch.randn(300, generator=torch.Generator().manual_seed(1))
    phi = data.shadows["shadows"].signals["phi"].mean(2) + 12 + excess + 1.5 * data.members

    def audited(phi, attacks):
        targets = {**data.targets, "control": TargetSignals({"phi": phi}, control=True)}
        return audit_signals(dataclasses.replace(data, targets=targets), Choices(attacks=attacks))

    report = audited(phi, ("lira", "lira_offline"))
    rows, setting = report.figures["control"], report.setting
    assert rows["lira"]["auc_ci"][0] < 0.5 < rows["lira_offline"]["auc_ci"][0]
    assert [setting["targets"][name]["primary"] for name in ("target", "control")] == ["lira", "lira_offline"]
    assert setting["control"] == {"name": "control", "found": True, "by": ["lira_offline"], "by_primary": True}
    assert setting["least_leak"]["shadows"]["attack"] == "lira"
    nothing = phi - 1.5 * data.members
    assert not audited(nothing, ("lira", "lira_offline")).setting["control"]["found"]
    # Named attacks without that form: the control is missed, and the warning says what would do.
    alone = audited(phi, ("lira", "attack_r"))
    assert alone.setting["control"] == {"name": "control", "found": True, "by": ["attack_r"], "by_primary": False}
    assert any("name lira_offline too" in line for line in alone.warnings)


@pytest.mark.parametrize(("name", "offline"), [("lira_fixed", "lira_offline_fixed"), ("rmia", "rmia_offline")])
def test_the_form_without_shadows_that_held_a_record(name, offline):
    assert offline_form(name) == offline_form(offline) == offline
    assert offline_form("loss") == "loss"
