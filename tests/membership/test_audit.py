"""The audit end to end on models small enough to memorise in a second, and its refusals."""

import json

import pytest
import torch
from torch import nn

import kr_fast
from kr_fast.data import Augment, Split
from kr_fast.ensemble import ModelArray, Shadows, TrainConfig, train_shadows
from kr_fast.ensemble.training import fit
from kr_fast.membership import lira

COUNT = 160
CONFIG = TrainConfig(epochs=25, batch_size=16, learning_rate=0.05, weight_decay=0.0, augment=Augment())


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))


def make_data(count=COUNT, seed=0):
    """Classes overlap widely, so that only memory tells a member."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    means = 96 + 16 * labels.view(-1, 1, 1, 1)
    noise = 60 * torch.randn(count, 8, 8, 1, generator=generator)
    return (means + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def scene():
    """(images, labels, members, overfitted target, target that saw none of the pool, 16 shadows)."""
    images, labels = make_data()
    members = torch.arange(COUNT) % 2 == 0
    torch.manual_seed(0)
    target, stranger = make_model(), make_model()
    fit(target, Split(images[members], labels[members]), CONFIG, seed=1)
    fit(stranger, Split(*make_data(seed=5)), CONFIG, seed=2)
    shadows = train_shadows(make_model, images, labels, num_models=16, config=CONFIG, seed=3)
    return images, labels, members, target, stranger, shadows


def test_memory_is_found_and_its_absence_too(scene):
    images, labels, members, target, stranger, shadows = scene
    report = kr_fast.audit({"target": target, "stranger": stranger}, shadows, images, labels, members)
    auc = {name: {attack: curve.auc for attack, curve in curves.items()} for name, curves in report.curves.items()}
    assert auc["target"]["lira"] > auc["target"]["lira_offline"] > 0.6
    assert auc["target"]["lira"] > auc["target"]["loss"] > 0.6
    for curve in report.curves["stranger"].values():
        low, high = curve.auc_interval(0.999)
        assert low <= 0.5 <= high
    assert report.warnings == ()
    assert (report.num_shadows, report.members, report.non_members, report.variance) == (16, 80, 80, "fixed")


def test_a_control_that_no_attack_finds_is_reported(scene):
    images, labels, members, _, stranger, shadows = scene
    few = Shadows(ModelArray(shadows.array.models[:4]), shadows.keep[:4])
    report = kr_fast.audit(stranger, few, images, labels, torch.roll(members, 1), attacks=("loss", "lira_offline"))
    assert any("no power" in line for line in report.warnings)
    assert any("shadows on a side" in line for line in report.warnings)


def test_report_is_strict_json(scene):
    images, labels, members, target, _, shadows = scene
    found = json.loads(json.dumps(kr_fast.audit(target, shadows, images, labels, members).to_dict(), allow_nan=False))
    row = found["target"]["lira"]
    assert set(row) >= {"auc", "auc_ci", "tpr_at_fpr", "balanced_accuracy"}
    assert row["auc_ci"][0] < row["auc"] <= row["auc_ci"][1]
    assert set(row["tpr_at_fpr"]) == {"0.1", "0.01", "0.001", "0.0001"}
    assert not row["tpr_at_fpr"]["0.001"]["point_claim"]  # 80 non-members cannot carry it
    assert found["setting"]["num_shadows"] == 16


def test_scores_are_those_of_the_attack(scene):
    images, labels, members, target, _, shadows = scene
    report = kr_fast.audit(target, shadows, images, labels, members, augment="flip")
    phi = shadows.array.signals(images, labels, augment="flip")["phi"]
    seen = ModelArray([target]).signals(images, labels, augment="flip")["phi"]
    for attack, variant in (("lira", "online"), ("lira_offline", "offline")):
        wanted = lira(phi, shadows.keep, variant=variant, variance="fixed", target=seen)[0]
        assert torch.equal(report.scores["target"][attack], wanted)
    loss = nn.functional.cross_entropy(ModelArray([target])(images)[0].double(), labels, reduction="none")
    assert torch.equal(report.scores["target"]["loss"].argsort(), (-loss).argsort())


def test_every_shadow_is_a_target(scene):
    """Leave-one-out over the shadows: each is attackable from the others."""
    images, labels, _, _, _, shadows = scene
    phi = shadows.array.signals(images, labels)["phi"]
    scores = lira(phi, shadows.keep, variance="fixed")
    aucs = [kr_fast.membership.roc(row, keep).auc for row, keep in zip(scores, shadows.keep, strict=True)]
    assert min(aucs) > 0.6


def test_examples_without_shadows_are_logged(scene, caplog):
    images, labels, _, _, _, shadows = scene
    phi = shadows.array.signals(images, labels)["phi"]
    keep = shadows.keep.clone()
    keep[:, 0] = True
    with caplog.at_level("WARNING", logger="kr_fast"):
        lira(phi, keep, variance="fixed")
    assert "16 (target, example) pairs have too few shadows" in caplog.text


class Softmax(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).softmax(1)


def test_bad_input(scene):
    images, labels, members, target, _, shadows = scene

    def refused(words, target=target, shadows=shadows, images=images, labels=labels, members=members, **options):
        with pytest.raises((ValueError, TypeError), match=words):
            kr_fast.audit(target, shadows, images, labels, members, **options)

    refused(r"target target must return logits \(remove its softmax\)", target=Softmax(target))
    soft = Shadows(ModelArray([Softmax(model) for model in shadows.array.models]), shadows.keep)
    refused("target shadow 0 must return logits", shadows=soft)
    refused("attacks must hold names among loss, lira, lira_offline, got shokri", attacks=("shokri",))
    refused(r"members must be bool \[160\]", members=members.long())
    refused(r"members must be bool \[160\]", members=members[:-1])
    refused("members must hold members and non-members, got 160 of 160", members=torch.ones(COUNT, dtype=torch.bool))
    refused("members must hold members and non-members, got 0 of 160", members=torch.zeros(COUNT, dtype=torch.bool))
    refused(r"labels must be int64 \[160\]", labels=labels[:-1])
    refused(r"labels must lie in \[0, 4\)", labels=labels + 1)
    refused(r"shadows must have keep \[16, 160\]", shadows=Shadows(shadows.array, shadows.keep.T))
    refused("keep must be bool", shadows=Shadows(shadows.array, shadows.keep.long()))
    two = Shadows(ModelArray(shadows.array.models[:2]), torch.stack([members, ~members]))
    refused("keep must give some example 2 shadows out", shadows=two)
    refused("target must hold at least one model", target={})
    broken = make_model()
    broken[1].weight.data *= 1e38
    broken[3].weight.data *= 1e38
    refused("logits must not hold NaN|logits must not hold", target=broken)
