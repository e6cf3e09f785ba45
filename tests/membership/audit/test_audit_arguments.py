"""``kr_fast.audit`` of anything that is no model, no shadows or no share: one error that names the argument."""

import numpy as np
import pytest
import torch
from audit_cases import audit, data
from torch import nn

import kr_fast
from kr_fast.ensemble import ModelArray, Shadows
from kr_fast.membership import Target, audit_signals
from kr_fast.runtime.errors import UserError

N, M = 130, 4


def net(outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, outputs))


class NanWhereWhite(nn.Module):
    """NaN for the one image whose first pixel is white."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return torch.where(x[:, 0, 0, 0, None] > 0.999, torch.nan, self.net(x))


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(0)
    models = [net() for _ in range(M + 1)]
    images = torch.randint(0, 250, (N, 4, 4, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[100, 0, 0] = 255
    keep = (torch.arange(M)[:, None] + torch.arange(N)) % 2 == 0
    return {
        "target": models[M],
        "shadows": Shadows(ModelArray(models[:M]), keep),
        "images": images,
        "labels": torch.arange(N) % 3,
        "members": torch.arange(N) < 60,
        "attacks": ("lira", "loss"),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": [net()]}, "target must be a classifier, or name -> classifier, got list of 1"),
        ({"target": "net.pt"}, "target must be a classifier, or name -> classifier, got str"),
        ({"target": {"t": "net.pt"}}, "target t must be a torch module or a ModelArray, got str"),
        ({"target": {"../t": net()}}, "target must have names that can be printed, without / and .*, got '../t'"),
        ({"target": {3: net()}}, "target must have names that can be printed"),
        ({"control": 3}, "target control must be a torch module or a ModelArray, got int"),
        ({"shadows": [net(), net()]}, "shadows must be Shadows .of train_shadows., or name -> such, got list of 2"),
        ({"shadows": {"a": net()}}, "shadows must be Shadows"),
        ({"shadows": {}}, "shadows must hold at least one set"),
        ({"attacks": "lira"}, "attacks must be a list of names, got 'lira'"),
        ({"target": Target("net.pt")}, "target target must be a torch module or a ModelArray, got str"),
        ({"images": "digits"}, "images must be a tensor, a numpy array or a list of numbers, got str"),
        ({"images": np.zeros((N, 4, 4))}, r"images must be uint8 \[N, H, W, C\], got float64"),
        ({"labels": torch.full((N,), 7)}, r"labels must lie in \[0, 3\)"),
        (
            {"population": (np.zeros((0, 4, 4, 1), np.uint8), [])},
            "images of the population must hold at least one image",
        ),
        ({"population": True}, r"population must be \(images, labels\) or a share in \(0, 1\), got True"),
        ({"population": 1.5}, r"population must be \(images, labels\) or a share in \(0, 1\), got 1.5"),
        ({"population": [1, 2, 3]}, "population must be .* got 3 values"),
        ({"level": "0.9"}, "level must be of type float, got '0.9'"),
        ({"priors": 0.5}, "priors must be a list, got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_arguments(scene, change, words):
    with pytest.raises(UserError, match=f"audit: {words}|ModelArray: {words}"):
        audit(**{**scene, **change})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"accuracy": 99.5}, r"accuracy must be in \[0, 1\], got 99.5"),
        ({"shared": True}, "shared of a target must be of type str, got True"),
        ({"title": None}, "title of a target must be of type str, got None"),
        ({"kind": "part"}, "kind must be full or transfer, got part"),
        ({"kind": ["full"]}, "kind must be full or transfer"),
    ],
)
def test_facts_of_a_target(facts, words):
    with pytest.raises(UserError, match=f"audit: {words}"):
        Target(net(), **facts)


def test_groups_of_options_are_what_they_should_be(scene):
    given = {name: value for name, value in scene.items() if name != "attacks"}
    for name, value in {"choices": {"attacks": ["lira"]}, "auxiliary": (1, 2)}.items():
        with pytest.raises(UserError, match=f"audit: {name} must be of type {name.title()}"):
            kr_fast.audit(**given, **{name: value})
    with pytest.raises(UserError, match="audit_signals: choices must be of type Choices"):
        audit_signals(data(), {"level": 0.9})


def test_numbers_that_are_none_in_any_answer(scene):
    """Beyond the first images that a model is asked for, too; of a target, a shadow and the population."""
    broken = NanWhereWhite()
    with pytest.raises(UserError, match="audit: signals of target-target: .*NaN"):
        audit(**{**scene, "target": broken})
    torch.manual_seed(1)
    models = ModelArray([NanWhereWhite() for _ in range(M)])
    with pytest.raises(UserError, match="audit: signals of shadows: .*NaN"):
        audit(**{**scene, "shadows": Shadows(models, scene["shadows"].keep)})
    z = scene["images"][::2].flip(0) // 2, scene["labels"][::2]
    z[0][3, 0, 0] = 255
    fine = {"images": scene["images"].clamp(max=250), "target": broken, "attacks": ("rmia",), "population": z}
    with pytest.raises(UserError, match="audit: population of target-target: .*NaN"):
        audit(**{**scene, **fine})


def test_one_logit_says_what_to_do(scene):
    """A net with one logit for two classes, as a target and as shadows."""
    hint = r"must return \[N, C\] logits .* got \[2, 1\] \(one logit z for two classes is torch.stack"
    labels = scene["labels"] % 2
    with pytest.raises(UserError, match=hint):
        audit(**{**scene, "target": net(1), "labels": labels})
    shadows = Shadows(ModelArray([net(1) for _ in range(M)]), scene["shadows"].keep)
    with pytest.raises(UserError, match=hint):
        audit(**{**scene, "target": net(2), "shadows": shadows, "labels": labels})


def test_signals_are_audit_data():
    for value in (None, {"keep": 1}, torch.zeros(3)):
        with pytest.raises(UserError, match="audit_signals: data must be an AuditData"):
            audit_signals(value)
