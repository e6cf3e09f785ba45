"""The audit of the ablation's Student has the population and the units of the run's own audit."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, train_shadows
from kr_fast.membership import Auxiliary, Choices
from kr_fast.recycling.stages import auditing
from kr_fast.recycling.stages.distillation import ablation


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("with_population", [False, True])
def test_it_needs_no_population_and_counts_groups(monkeypatch, with_population):
    images = torch.randint(0, 256, (120, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, members, groups = torch.arange(80) % 3, torch.arange(80) < 40, torch.arange(80) // 4
    recipe = TrainConfig(epochs=1, batch_size=16, augment=Augment())
    options = {"num_models": 8, "config": recipe, "seed": 0, "groups": groups}
    made = train_shadows(make, images[:80], labels, **options)
    monkeypatch.setattr(auditing.shadow_students, "load", lambda context, of_ablation: made)
    monkeypatch.setattr(ablation, "load", lambda context, variant: make())
    context = SimpleNamespace(config=SimpleNamespace(labels="soft", fixed_images=False))
    population = (images[80:], torch.arange(40) % 3) if with_population else None
    attack = functools.partial(auditing._of_ablation, context, (images[:80], labels, members))
    found = [
        attack({"auxiliary": Auxiliary(population), "choices": Choices(seed=1), "groups": units})
        for units in (None, groups)
    ]
    expected = list(ablation.ATTACKS) if with_population else ["lira", "lira_offline"]
    for rows in found:
        assert list(rows) == expected
    assert found[0]["lira"]["mean"] == found[1]["lira"]["mean"]
    assert found[0]["lira"]["interval"] != found[1]["lira"]["interval"]
