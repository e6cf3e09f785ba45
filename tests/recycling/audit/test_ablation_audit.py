"""The audit of a run names classes, and that of the ablation's Students has its population and units."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, train_shadows
from kr_fast.membership import Auxiliary, Choices, audit
from kr_fast.recycling.stages import auditing
from kr_fast.recycling.stages.distillation import ablation

RECIPE = TrainConfig(epochs=1, batch_size=16, augment=Augment())


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("with_population", [False, True])
def test_it_needs_no_population_and_counts_groups(monkeypatch, caplog, with_population):
    images = torch.randint(0, 256, (120, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, groups = torch.arange(80) % 3, torch.arange(80) // 4
    options = {"num_models": 8, "config": RECIPE, "seed": 0, "groups": groups}
    made = train_shadows(make, images[:80], labels, **options)
    monkeypatch.setattr(auditing.shadow_students, "load", lambda context, of_ablation: made)
    population = (images[80:], torch.arange(40) % 3) if with_population else None
    index, rest = torch.arange(80), (Auxiliary(population), Choices(seed=1))
    found = [
        auditing._of_ablation(SimpleNamespace(), (images[:80], labels, units), index, *rest) for units in (None, groups)
    ]
    expected = list(ablation.ATTACKS) if with_population else ["lira", "lira_offline"]
    for rows in found:
        assert list(rows) == expected
    assert found[0]["lira"]["mean"] == found[1]["lira"]["mean"]
    assert found[0]["lira"]["interval"] != found[1]["lira"]["interval"]
    # The run's audit has the positive control, and this one no model that would need one beside it.
    assert "positive control" not in caplog.text
    assert "only 4 shadows of the ablation's Students on a side" in caplog.text


def test_it_attacks_what_the_runs_audit_attacked(monkeypatch):
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (60, 8, 8, 1), dtype=torch.uint8, generator=draw)
    labels, members, index = torch.arange(60) % 3, torch.arange(60) < 30, torch.arange(60) % 5 > 0
    made = train_shadows(make, images, labels, num_models=8, config=RECIPE, seed=0)
    monkeypatch.setattr(auditing.shadow_students, "load", lambda context, of_ablation: made)
    at = index.nonzero()[:, 0]
    choices = Choices(seed=1, leave_out_duplicates=True)
    found = auditing._of_ablation(SimpleNamespace(), (images, labels, None), at, Auxiliary(), choices)
    # A target changes nothing in how shadows are attacked from each other.
    given = {"non_members": index & ~members, "choices": Choices(attacks=("lira", "lira_offline"), seed=1)}
    report = audit(make(), made, images, labels, index & members, **given)
    for name, row in report.leave_one_out["shadows"].items():
        assert found[name] == {key: row["auc"][key] for key in ("mean", "sd", "interval")}


def test_classes_are_called_by_their_names():
    rows = [{"label": "0", "found": 1}, {"label": "2", "found": 0}, {"label": "all others", "found": 0}]
    records = {"teacher": {"classes": {"rows": rows}}, "student": {"classes": None}}
    auditing.name_classes(records, ("benign", "malignant", "normal"))
    assert [row["label"] for row in rows] == ["benign", "normal", "all others"]
