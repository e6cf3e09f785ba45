"""What callers hand to the training functions: taken, or refused in one line before anything is trained or written."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kr_fast.data import Augment, Split
from kr_fast.ensemble import ModelArray, TrainConfig, accuracy, fit, train_shadows
from kr_fast.membership import overfitted
from kr_fast.runtime.errors import UserError

CONFIG = TrainConfig(epochs=1, batch_size=8, learning_rate=0.05, augment=Augment())
IMAGES = torch.randint(0, 256, (24, 6, 6, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def shadows(images=IMAGES, labels=LABELS, make=net, **options):
    return train_shadows(make, images, labels, **{"num_models": 2, "config": CONFIG, "seed": 0} | options)


def fitted(images=IMAGES, labels=LABELS, make=net):
    fit(make(), Split(images, labels), CONFIG, seed=0)


def judged(images=IMAGES, labels=LABELS, make=net):
    accuracy(make(), Split(images, labels))


def control(images=IMAGES, labels=LABELS, make=net):
    overfitted(make, images, labels, torch.arange(24) < 12, like=CONFIG, seed=0)


def line(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FLOATS = (IMAGES.float() / 255, IMAGES.permute(0, 3, 1, 2).float(), IMAGES.numpy() / 255.0, IMAGES.long())
COLOUR = IMAGES.expand(-1, -1, -1, 3).permute(0, 3, 1, 2)  # [N, C, H, W]


@pytest.mark.parametrize("call", [shadows, fitted, judged, control])
def test_pixels_of_another_kind_are_refused_everywhere(call):
    for images in FLOATS:
        assert "be uint8 [N, H, W, C], got" in line(call, images)
    assert "(x.permute(0, 2, 3, 1) makes [N, H, W, C] of [N, C, H, W])" in line(call, COLOUR)
    assert "(x[..., None] adds the channel)" in line(call, IMAGES[..., 0])
    assert "(pixels in [0, 1] are made uint8 by" in line(call, FLOATS[0])
    assert "images" in line(call, None)


@pytest.mark.parametrize("call", [shadows, fitted, judged, control])
def test_labels_of_another_kind_are_refused_everywhere(call):
    for labels in (LABELS.float(), LABELS[:-1], LABELS[None], LABELS == 0, None, ["a"] * 24):
        assert "labels" in line(call, IMAGES, labels)
    assert "at least 0, got [-1, 1]" in line(call, IMAGES, LABELS - 1)


@pytest.mark.parametrize("call", [shadows, fitted, control])
def test_labels_beyond_the_logits_are_refused(call):
    assert "lie in [0, 3), got [1, 3]" in line(call, IMAGES, LABELS + 1)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["u1", "i2", "u4", "i4", ">i8", "i8"]), st.booleans(), st.booleans())
def test_numpy_and_integers_of_any_dtype_are_the_same_examples(dtype, column, listed):
    values = LABELS.numpy().astype(dtype)
    labels = values[:, None] if column else values
    labels = labels.tolist() if listed else labels
    models = [net(), net()]
    models[1].load_state_dict(models[0].state_dict())
    fit(models[0], Split(IMAGES, LABELS), CONFIG, seed=0, val=Split(IMAGES, LABELS))
    fit(models[1], Split(IMAGES.numpy(), labels), CONFIG, seed=0, val=Split(IMAGES.numpy(), labels))
    assert torch.equal(models[0][1].weight, models[1][1].weight)
    assert accuracy(models[0], Split(IMAGES.numpy(), labels)) == accuracy(models[0], Split(IMAGES, LABELS))


def test_shadows_and_control_take_numpy(tmp_path):
    """Of equal examples: each folder refuses others by their hash."""
    first = shadows(out=tmp_path)
    columns = {"images": IMAGES.numpy(), "labels": LABELS.int()[:, None].numpy()}
    again = shadows(**columns, num_models=np.int64(2), seed=np.int64(0), out=tmp_path)
    assert torch.equal(first.array(IMAGES), again.array(IMAGES))
    options = {"like": CONFIG, "seed": 0, "path": tmp_path / "control.safetensors"}
    members = torch.arange(24) < 12
    expected = overfitted(net, IMAGES, LABELS, members, **options)
    for result in (members.numpy(), range(12), list(range(12))):
        model = overfitted(net, *columns.values(), result, **options)
        assert torch.equal(model[1].weight, expected[1].weight)
    assert line(overfitted, net, IMAGES, LABELS, [0, 0], **options).startswith("overfitted: members must be bool [24]")


class Odd(nn.Module):
    """What ``answer`` makes of logits, in training mode."""

    def __init__(self, answer):
        super().__init__()
        self.head, self.answer = nn.Linear(36, 3), answer

    def forward(self, x):
        z = self.head(x.flatten(1))
        return self.answer(z) if self.training else z


SHARED, ONCE, WIDTHS = nn.Linear(36, 3), net(), itertools.count(4)
WEIGHT, STATE = torch.zeros(3, 36), net().state_dict()


def tied():
    """Weights that are objects of their own, in one memory."""
    model = net()
    model[1].weight = nn.Parameter(WEIGHT)
    return model


def loaded():
    model = net()
    model.load_state_dict(STATE, assign=True)
    return model


def wider():
    width = next(WIDTHS)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Linear(width, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ONCE, "make_model must return a fresh module at every call, got the same object twice"),
        (lambda: nn.Sequential(nn.Flatten(), SHARED), "at every call, got 1.weight of the call before once more"),
        (wider, "models must share one architecture, got 1.weight [4, 36] and [5, 36] in 0 and 1"),
        (net(), "make_model must be a function that returns a torch module, got the network itself, a Sequential"),
        (tied, "at every call, got 1.weight of the call before once more"),
        (loaded, "at every call, got 1.weight of the call before once more"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), "got [2, 1] (one logit z for two classes is torch.sta"),
        (lambda: None, "make_model must return a torch module, got None"),
        (lambda: 1 / 0, "make_model must return a torch module, got the error ZeroDivisionError: division by zero"),
        (lambda: nn.LazyLinear(3), "make_model must be a torch module with all its sizes"),
        (lambda: nn.Linear(6, 3), "logits for 6 x 6 x 1 images, got [2, 1, 6, 3]"),
        (lambda: nn.Sequential(*net(), nn.Softmax(1)), "make_model must return logits (remove its softmax)"),
        (lambda: Odd(lambda z: (z, z)), "6 x 6 x 1 images, got a tuple of 2 (return the logits alone)"),
        (lambda: Odd(lambda z: z.detach()), "that have a gradient, got logits without"),
        (lambda: Odd(lambda z: {}[0]), "6 x 6 x 1 images, got the error KeyError: 0"),
    ],
)
def test_models_that_cannot_be_shadows(tmp_path, make, words):
    result = line(shadows, make=make, out=tmp_path / "out")
    assert result.startswith("train_shadows: ")
    assert words in result
    assert not (tmp_path / "out").exists()


class Scaled(nn.Module):
    """Divides by a constant, behind a frozen layer: both are one for all models."""

    FROZEN, DEVIATION = nn.Linear(36, 4).requires_grad_(False), torch.full((4,), 2.0)

    def __init__(self):
        super().__init__()
        self.body, self.head = self.FROZEN, nn.Linear(4, 3)
        self.register_buffer("deviation", self.DEVIATION)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)) / self.deviation)


def test_what_no_training_writes_may_be_shared():
    first, second = shadows(make=Scaled).array.models
    assert not torch.equal(first.head.weight, second.head.weight)
    norm = nn.BatchNorm1d(36, affine=False)
    assert "got 1.running_mean of the call before" in line(
        shadows, make=lambda: nn.Sequential(nn.Flatten(), norm, nn.Linear(36, 3))
    )


def test_training_many_at_once_leaves_the_random_numbers_of_others():
    before = torch.random.get_rng_state()
    shadows(batched=True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_arguments_of_shadows(tmp_path):
    (tmp_path / "file").touch()
    assert line(shadows, out=tmp_path / "file") == f"train_shadows: out must be a folder, got {tmp_path / 'file'}"
    shadows(out=tmp_path / "out")
    (tmp_path / "out" / "shadows.json").write_text("[]")
    assert line(shadows, out=tmp_path / "out").endswith("shadows.json must hold a JSON dict, got a list")
    assert "num_models must fit the memory with 24 examples, got 1000000000, which take" in line(
        shadows, num_models=10**9
    )
    assert line(shadows, IMAGES[:3], LABELS[:3]).startswith(
        "train_shadows: images must be enough for two in each model"
    )
    assert "images must hold examples" in line(shadows, IMAGES[:0], LABELS[:0])
    assert "num_models must be an integer, got 2.5" in line(shadows, num_models=2.5)
    assert "seed must be an integer, got None" in line(shadows, seed=None)
    assert "config must be a TrainConfig, got dict" in line(shadows, config={"epochs": 1})


class Breaks(nn.Module):
    """Fails at its ``last`` call in training mode, or in its backward."""

    def __init__(self, last, backward=False):
        super().__init__()
        self.head, self.last, self.backward = nn.Linear(36, 3), last, backward

    def forward(self, x):
        z = self.head(x.flatten(1))
        self.last -= self.training
        if self.last == 0 and self.backward:
            y = z.exp()
            y.mul_(2)
            return y
        return None if self.last == 0 else z


def test_a_network_that_breaks_while_it_is_trained():
    assert line(fitted, make=lambda: Breaks(3)) == (
        "fit: model must return [N, C] logits for 6 x 6 x 1 images, got None (return the logits alone)"
    )
    assert "got the error one of the variables needed for gradient" in line(fitted, make=lambda: Breaks(3, True))
    words = line(shadows, make=lambda: Breaks(2), config=TrainConfig(epochs=1, batch_size=4))
    assert words.startswith("train_shadows: model must return [N, C] logits for 6 x 6 x 1 images, got None")


class Caches(nn.Module):
    """Makes what it multiplies by at its first call, as rotary embeddings are made."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(36, 3), None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(3)
        return self.head(x.flatten(1)) * self.scale


def test_asking_leaves_nothing_that_cannot_be_trained_with():
    fitted(make=Caches)


def test_models_that_cannot_be_trained_or_asked():
    assert "model must have weights to train" in line(fitted, make=nn.Flatten)
    assert "model must have weights to train" in line(fitted, make=lambda: net().requires_grad_(False))
    assert "model must be a torch module, got NoneType" in line(fitted, make=lambda: None)
    assert "model must be a torch module, got NoneType" in line(judged, make=lambda: None)
    assert "fit: split must be a Split of images and labels, got tuple of 2" in line(
        fit, net(), (IMAGES, LABELS), CONFIG, seed=0
    )
    for options, words in (
        ({"config": None}, "config must be a TrainConfig, got NoneType"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"save_every": 0}, "save_every must be an integer, at least 1, got 0"),
        ({"config": TrainConfig(augment=Augment(shift=6))}, "Augment: shift must be below the shorter .* 6, got 6"),
    ):
        result = line(fit, net(), Split(IMAGES, LABELS), **{"config": CONFIG, "seed": 0} | options)
        assert re.search(words, result)
    assert line(TrainConfig, augment={"shift": 1}) == ("TrainConfig: augment must be of type Augment, got {'shift': 1}")
    assert "accuracy: labels of split must lie in [0, 3), got [1, 3]" in line(judged, IMAGES, LABELS + 1)
    small = Split(IMAGES[:, :5], LABELS)
    assert "fit: images of val must be uint8 [N, 6, 6, 1], got uint8 [24, 5, 6, 1]" in line(
        fit, net(), Split(IMAGES, LABELS), CONFIG, seed=0, val=small
    )
    assert "accuracy: split must hold at least one example" in line(judged, IMAGES[:0], LABELS[:0])


def test_a_state_of_another_training(tmp_path):
    path = tmp_path / "state.pt"
    options = {"seed": 0, "state_path": path, "save_every": 1}

    class Stopped(Exception):
        pass

    class Stops(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) if self.calls < 5 else exit()

    with pytest.raises(SystemExit):
        fit(Stops(*net()), Split(IMAGES, LABELS), TrainConfig(epochs=3, batch_size=8), **options)
    assert path.exists()
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    words = line(fit, other, Split(IMAGES, LABELS), TrainConfig(epochs=3, batch_size=8), **options)
    assert words.startswith(f"{path} must hold where this training stood (remove it to begin anew), got ")


def test_lists_of_models():
    model = net()
    assert "models must be a list of modules or state dicts, got one Sequential ([model])" in line(ModelArray, model)
    assert "got one OrderedDict ([model])" in line(ModelArray, model.state_dict(), net)
    assert "models must be a list of modules or state dicts, got int" in line(ModelArray, 3)
    assert "models must hold modules or state dicts, got int" in line(ModelArray, [3])
    assert "models must hold at least one model, got 0" in line(ModelArray, iter([]))
    assert "make_model must be given for models that are state dicts" in line(ModelArray, [model.state_dict()])
    assert "make_model must return a torch module, got None" in line(ModelArray, [model.state_dict()], lambda: None)
    assert "model 1 must be a torch module with all its sizes" in line(ModelArray, [model, nn.LazyLinear(3)])
    state = model.state_dict()
    state["1.weight"] = torch.zeros(4, 36)
    assert "ModelArray: models must fit make_model, got for model 0: " in line(ModelArray, [state], net)
    for models in (iter([model]), nn.ModuleList([model]), (model,)):
        assert len(ModelArray(models)) == 1
