"""``kr-fast audit``: whatever is refused is refused in one line before the folder is made, and nothing is left."""

import functools
import json
import os

import cli_cases
import numpy as np
import pytest
import torch
from audit_cases import logits_of
from torch import nn

from kr_fast.membership.audit.config import AuditConfig
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files

FACTORY = """
import torch
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, num_classes))
class Odd(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = make(num_classes)
    def forward(self, x):
        z = self.net(x)
        return z / (x.amax((1, 2, 3)) < 0.99)[:, None]
class Untrained(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = make(num_classes)
    def forward(self, x):
        if self.training:
            raise KeyError("no training")
        return self.net(x)
def odd(num_classes): return Odd(num_classes)
def untrained(num_classes): return Untrained(num_classes)
def binary(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
"""

refused = functools.partial(cli_cases.refused, aside="is missing")


pytestmark = pytest.mark.usefixtures("no_progress", "released_run")


def arrays(**changes):
    logits, keep, labels, members = (value.numpy() for value in logits_of())
    result = {"keep": keep, "labels": labels, "members": members, "logits": logits[:-1], "target/t/logits": logits[-1]}
    return {key: value for key, value in {**result, **changes}.items() if value is not None}


def changed(name, at, value):
    result = arrays()[name].copy()
    result[at] = value
    return {name: result}


SAVED = {
    "keep all True": ({"keep": np.ones((12, 80), bool)}, [], "lira: keep must give some example 2 shadows out of it"),
    "keep all False": (
        {"keep": np.zeros((12, 80), bool)},
        ["--attacks", "lira"],
        "audit: attacks must be possible with what was given: lira needs shadows that held some of the examples",
    ),
    "an example in every shadow": (
        changed("keep", (slice(None), 3), True),
        ["--attacks", "lira_carlini2021_online"],
        "lira_carlini2021: keep must leave every example a shadow on each side",
    ),
    "one class": ({"members": np.ones(80, bool)}, [], "audit: members must hold members and non-members, got 80 of 80"),
    "+inf": (changed("logits", (3, 4, 1), np.inf), [], "audit: logits must not hold +inf (a number that overflowed"),
    "NaN": (changed("target/t/logits", (4, 1), np.nan), [], "audit: target/t/logits must not hold NaN, got 1 NaN in"),
    "accuracy": (
        {"about": np.array(json.dumps({"targets": {"t": {"accuracy": "NaN"}}}))},
        [],
        "audit: accuracy must be in [0, 1], got 'NaN' in",
    ),
    "no shadows": ({"keep": None}, [], "audit: signals must hold the key keep"),
    "one shadow": ({"keep": np.ones((1, 80)), "logits": arrays()["logits"][:1]}, [], "audit: shadows must be at least"),
    "rounded": (
        {"logits": np.round(logits_of()[0][:-1].softmax(-1).numpy(), 2)},
        [],
        "audit: logits must be logits, from before the softmax (probabilities=True takes the logarithm where nothing",
    ),
    "a target among its shadows": (
        {"target/t/logits": logits_of()[0][5].numpy()},
        [],
        "audit: target t must not be among its shadows",
    ),
    "a target alone": (
        {"keep": None, "logits": None},
        ["--attacks", "lira"],
        "audit: attacks must be possible with what was given: lira needs shadow models",
    ),
    "coins": ({"members": np.arange(80) < 9}, ["--random-members"], "audit: members must be about half of the"),
    "every shadow": (
        {"keep": (np.arange(3)[:, None] + np.arange(80)) % 2, "logits": arrays()["logits"][:3]},
        ["--every-shadow", "--attacks", "lira_per_example"],
        "lira: keep must give some example 3 shadows",
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_signals(tmp_path, capsys, case):
    change, flags, words = SAVED[case]
    np.savez(tmp_path / "s.npz", **arrays(**change))
    assert words in refused(capsys, "audit", "--signals", tmp_path / "s.npz", "--out", tmp_path / "out", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """data.npz of 60 / 20 / 40 images, oddnets.py, weights; images of the last row of pixels at most 250."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "oddnets.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    data = {}
    for which, count in (("train", 60), ("val", 20), ("test", 40)):
        data |= {
            f"{which}_images": rng.integers(0, 240, (count, 8, 8), np.uint8),
            f"{which}_labels": np.arange(count) % 2,
        }
    np.savez(folder / "data.npz", **data)
    np.savez(folder / "copies.npz", **{**data, "val_images": data["train_images"][:20]})
    data["test_images"] = data["test_images"].copy()
    data["test_images"][39, 0, 0] = 255
    np.savez(folder / "odd.npz", **data)

    def net(outputs=2):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, outputs))

    torch.manual_seed(0)
    models = [net() for _ in range(4)]
    torch.save(models[0].state_dict(), folder / "net.pt")
    torch.save({f"net.{key}": value for key, value in models[0].state_dict().items()}, folder / "inner.pt")
    torch.save({"1.weight": torch.randn(1, 64), "1.bias": torch.zeros(1)}, folder / "binary.pt")
    broken = models[1].state_dict() | {"3.bias": torch.full((2,), torch.nan)}
    torch.save(broken, folder / "nan.pt")
    keep = (np.arange(4)[:, None] + np.arange(100)) % 2 == 0
    for name, order in (("own", (0, 1, 2, 3)), ("others", (1, 2, 3)), ("all", (1, 2, 3)), ("broken", (1, 2, 3))):
        (folder / name).mkdir()
        np.save(folder / name / "keep.npy", keep[: len(order)] | (name == "all"))
        for at, index in enumerate(order):
            weights = models[index].state_dict()
            if name == "broken" and at == 1:
                weights = weights | {"3.bias": torch.full((2,), torch.inf)}
            files.save_tensors(folder / name / f"model-{at:03d}.safetensors", weights)
    np.save(folder / "black.npy", np.zeros((9, 8, 8), np.uint8))
    return folder


MODELS = {
    "NaN weights": (["--checkpoint", "nan.pt"], "audit: "),
    "NaN for one image": (
        ["--model", "oddnets:odd", "--checkpoint", "inner.pt", "--data", "odd.npz"],
        "audit: the answers of target: ",
    ),
    "a population under attack": (["--data", "copies.npz"], "audit: population must be further examples, not among"),
    "too few shadows to leave one out": (
        ["--attacks", "lira_per_example", "--every-shadow", "--num-shadows", "4"],
        "lira: keep must give some example",
    ),
    "no shadow without an example": (["--shadows", "all"], "lira: keep must give some example 2 shadows out of it"),
    "the target among the shadows": (
        ["--shadows", "own"],
        "audit: target target must not be among its shadows (leave that shadow out), got shadow",
    ),
    "a broken shadow": (["--shadows", "broken", "--no-control"], "model must hold finite weights"),
    "not to be trained": (["--model", "oddnets:untrained", "--checkpoint", "inner.pt"], "KeyError: 'no training'"),
    "one logit": (["--model", "oddnets:binary", "--checkpoint", "binary.pt"], "audit: "),
    "images that are all equal": (
        ["--synthetic", "black.npy", "--data", "black.npz", "--attacks", "loss", "generated_density"],
        "audit: synthetic must differ between images, got identical images",
    ),
    "three means": (["--mean", "0", "0", "0", "--std", "1", "1", "1"], "audit: mean must hold one number, or one"),
    "two means, one deviation": (["--mean", "0", "0", "--std", "1"], "audit: mean and std must hold as many"),
    "no deviation": (["--mean", "0", "--std", "0"], "audit: std must be in (0, 10], got 0.0"),
    "a pipe": (["--members", "pipe.txt"], "audit: members must be a regular file, got pipe.txt"),
    "a pipe of images": (["--synthetic", "pipe.npy"], "audit: synthetic must be a regular file, got pipe.npy"),
    "a primary that is not run": (["--attacks", "loss", "--primary", "lira"], "audit: primary must be one of the"),
    "too many shadows": (["--num-shadows", "100000000"], "audit: num_shadows must be in [4, 10000], got 100000000"),
    "two columns": (["--members", "two.csv"], "audit: members must be a file of one column"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(world, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    for name in ("pipe.txt", "pipe.npy"):
        if not (world / name).exists():
            os.mkfifo(world / name)
    (world / "two.csv").write_text("index,member\n0,1\n1,0\n")
    with np.load(world / "data.npz") as archive:
        data = dict(archive)
    np.savez(world / "black.npz", **data | {"val_images": np.zeros_like(data["val_images"])})
    flags, words = MODELS[case]
    start = ["audit", "--model", "oddnets:make", "--checkpoint", "net.pt", "--data", "data.npz", "--epochs", "1"]
    result = refused(capsys, *start, "--out", tmp_path / "out", *flags)
    assert words in result
    assert not list(tmp_path.iterdir())


NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    0,
    0.5,
    1,
    2,
    8,
    1e9,
    1e300,
    10**30,
    -(10**30),
    True,
    "3",
    None,
    [],
)


def built(options):
    """(the configuration, None), or (None, why it is refused)."""
    try:
        return AuditConfig(**options), None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize(
    "name",
    [
        "width",
        "cut",
        "val_fraction",
        "test_fraction",
        "num_shadows",
        "epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "label_smoothing",
        "mixup",
        "shift",
        "rotate",
        "scale",
        "level",
        "delta",
        "rmia_gamma",
        "rmia_offline_a",
        "seed",
        "mean",
        "std",
        "priors",
    ],
)
def test_every_number_has_a_range(name):
    """Taken as a finite number of its type, or refused by name; what no model or recipe can be is among the refused."""
    given = {"model": "m:m", "checkpoint": ("a.pt",), "data": "digits", "mean": (0.5,), "std": (0.5,), "cut": 0}
    given["attacks"] = ("lira", "rmia", "rmia_offline")
    taken = []
    for value in NUMBERS:
        many = name in ("mean", "std", "priors")
        config, error = built({**given, name: (value,) if many else value})
        if config is None:
            assert f"audit: {name} must " in error
            continue
        result = getattr(config, name)[0] if many else getattr(config, name)
        assert type(result) in (int, float)
        assert abs(result) < 1e12
        taken.append(value)
    assert taken
    assert len(taken) < 9
    assert min(taken) >= (-1 if name in ("mean", "cut") else 0)
