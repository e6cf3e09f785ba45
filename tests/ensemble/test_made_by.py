"""Recipes of shadow models: what they hold, that folders record them, that another one makes an audit a transfer."""

import dataclasses
import functools
import hashlib
import json

import numpy as np
import pytest
import torch
from audit_cases import audit
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, load_shadows, recipe_of, train_shadows
from kr_fast.ensemble.made_by import difference, recipe_digest
from kr_fast.membership import Target, overfitted
from kr_fast.membership.audit import loading
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.models import classifier
from kr_fast.report import audit_tables
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files

CONFIG = TrainConfig(epochs=1, batch_size=8, augment=Augment(shift=1))
IMAGES, LABELS = torch.arange(16 * 60).remainder(251).reshape(60, 4, 4, 1).to(torch.uint8), torch.arange(60) % 3
MEMBERS = torch.arange(60) < 40


def net(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))


def shadows(out=None, **change):
    options = {"num_models": 4, "config": CONFIG, "seed": 0, "out": out, **change}
    return train_shadows(net, IMAGES, LABELS, **options)


def test_values_and_digest():
    recipe = recipe_of(net(), CONFIG, temperature=4.0)
    shapes = {"1.weight": [4, 16], "1.bias": [4], "3.weight": [3, 4], "3.bias": [3]}
    architecture = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    expected = {"architecture": architecture, "loss": "cross-entropy", **dataclasses.asdict(CONFIG), "temperature": 4.0}
    assert recipe == expected
    assert recipe_digest(recipe) == hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    with pytest.raises(UserError, match="recipe_of: config must be a TrainConfig, got dict"):
        recipe_of(net(), {})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (recipe_of(net(), CONFIG), ""),
        (recipe_of(net(5), TrainConfig()), "another architecture"),
        (recipe_of(net(), CONFIG, "distillation"), "loss is distillation, of the shadows cross-entropy"),
        (recipe_of(net(), CONFIG, periods=[2]), "periods is [2], of the shadows nothing"),
        (recipe_of(net(), dataclasses.replace(CONFIG, epochs=2)), "epochs is 2, of the shadows 1"),
        (recipe_of(net(), dataclasses.replace(CONFIG, augment=Augment(shift=1, flip=True))), "flip is True, of the"),
    ],
)
def test_what_differs_is_named(other, words):
    found = difference(other, recipe_of(net(), CONFIG))
    assert found.startswith(words)
    assert bool(found) is bool(words)


def test_folders_hold_it(tmp_path):
    """Also the control's; a folder without it, of an older version, loads and goes on."""
    made = shadows(tmp_path / "out")
    path = tmp_path / "out" / "shadows.json"
    record = files.read_json(path, dict)
    assert record["recipe"] == made.recipe == recipe_of(net(), CONFIG)
    assert record["recipe_sha256"] == recipe_digest(made.recipe)
    sizes = made.keep.sum(1).tolist()
    assert record["training_sizes"] == [min(sizes), max(sizes)]
    assert load_shadows(net, tmp_path / "out").recipe == made.recipe
    files.write_json(path, {**record, "recipe": {**made.recipe, "epochs": 7}})
    with pytest.raises(UserError, match="shadows.json must hold a recipe with its SHA-256"):
        load_shadows(net, tmp_path / "out")
    older = {key: value for key, value in made.recipe.items() if key != "mixup"}  # of before there was one
    record_of_older = {key: value for key, value in record.items() if key != "mixup"}
    files.write_json(path, {**record_of_older, "recipe": older, "recipe_sha256": recipe_digest(older)})
    assert difference(made.recipe, load_shadows(net, tmp_path / "out").recipe) == ""
    shadows(tmp_path / "out")
    added = ("recipe", "recipe_sha256", "training_sizes")
    files.write_json(path, {key: value for key, value in record.items() if key not in added})
    assert load_shadows(net, tmp_path / "out").recipe is None
    (tmp_path / "out" / "model-003.safetensors").unlink()
    shadows(tmp_path / "out")
    with pytest.raises(UserError, match="train_shadows: epochs must equal 1 of the shadows"):
        shadows(tmp_path / "out", config=dataclasses.replace(CONFIG, epochs=2))
    options = {"like": CONFIG, "seed": 0, "path": tmp_path / "control.safetensors"}
    overfitted(net, IMAGES, LABELS, MEMBERS, **options)
    control = files.read_json(tmp_path / "control.json", dict)
    assert len(control.pop("recipe_sha256")) == 64
    files.write_json(tmp_path / "control.json", control)
    overfitted(net, IMAGES, LABELS, MEMBERS, **options)
    with pytest.raises(UserError, match="overfitted: weight_decay|overfitted: epochs|overfitted: batch_size"):
        overfitted(net, IMAGES, LABELS, MEMBERS, **{**options, "like": dataclasses.replace(CONFIG, batch_size=4)})


@pytest.mark.parametrize(
    ("recipe", "kind", "told"),
    [
        (recipe_of(net(), CONFIG), "full", "equal"),
        (recipe_of(net(), dataclasses.replace(CONFIG, epochs=2)), "transfer", "epochs is 2, of the shadows 1"),
        (None, "full", "unknown"),
    ],
)
def test_an_audit_by_another_recipe_is_a_transfer(recipe, kind, told):
    target = Target(net(), "full", recipe=recipe)
    setting = audit(target, shadows(), IMAGES, LABELS, MEMBERS, attacks=["lira", "loss"]).setting
    facts, of_shadows = setting["targets"]["target"], setting["shadow_sets"]["shadows"]
    assert (facts["kind"], facts["recipe"]) == (kind, told)
    assert facts["training_size"] == 40
    assert of_shadows["training_size"] == 30
    words = f"recipe: {told}; trained on 40 of these examples, a shadow on 30"
    assert words in audit_tables.targets({"setting": setting})[1][1]
    assert any(f"(transfer: {told})" in note for note in setting["notes"]) is (kind == "transfer")


def test_options_of_the_command_are_the_recipe_of_the_target(tmp_path):
    """Where none is given, nothing says how the target was made."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    splits = {"train": slice(0, 40), "val": slice(0, 10), "test": slice(40, 60)}
    arrays = {f"{name}_images": noise[at] for name, at in splits.items()}
    np.savez(tmp_path / "set.npz", **arrays, **{f"{name}_labels": LABELS.numpy()[at] for name, at in splits.items()})
    make = functools.partial(classifier, "resnet8", num_classes=3, in_channels=1, width=2)
    options = {"num_models": 4, "config": TrainConfig(epochs=1, batch_size=8), "seed": 0, "out": tmp_path / "shadows"}
    train_shadows(make, noise[..., None], LABELS, **options)
    torch.save(make().state_dict(), tmp_path / "net.pt")
    given = {"model": "resnet8", "width": 2, "checkpoint": (str(tmp_path / "net.pt"),), "control": False}
    given |= {"data": str(tmp_path / "set.npz"), "shadows": str(tmp_path / "shadows"), "population": "none"}
    for epochs, words in ((1, ""), (3, "epochs is 3, of the shadows 1")):
        loaded = loading.load(AuditConfig(**given, batch_size=8, epochs=epochs))
        assert difference(loaded.targets["target"].recipe, loaded.shadows.recipe) == words
    assert loading.load(AuditConfig(**given)).targets["target"].recipe is None


def test_a_recipe_is_a_mapping():
    with pytest.raises(UserError, match="audit: recipe of a target must be a recipe"):
        Target(functools.partial(net), recipe=CONFIG)
