"""Models that a user names, and shadows from a folder."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, load_shadows, train_shadows
from kr_fast.ensemble.loading import factory, load_weights, model_factory
from kr_fast.models import ResNet
from kr_fast.runtime.errors import UserError

CONFIG = TrainConfig(epochs=1, batch_size=8, learning_rate=0.1, augment=Augment())
make = functools.partial(nn.Linear, 3, 2)


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def test_shadows_come_back(tmp_path):
    images, labels = torch.randint(0, 256, (24, 8, 8, 1), dtype=torch.uint8), torch.arange(24) % 2
    trained = train_shadows(net, images, labels, num_models=4, config=CONFIG, seed=0, out=tmp_path)
    found = load_shadows(net, tmp_path)
    assert torch.equal(found.keep, trained.keep)
    assert torch.equal(found.array(images), trained.array(images))
    (tmp_path / "model-002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="folder must hold 4 models, got no .*model-002.safetensors"):
        load_shadows(net, tmp_path)
    with pytest.raises(ValueError, match=r"load_shadows: model must hold weight of shape \[2, 3\], got nothing"):
        load_shadows(make, tmp_path)
    np.save(tmp_path / "keep.npy", trained.keep.long().numpy())
    with pytest.raises(ValueError, match=r"keep.npy must be bool \[M, N\], got int64"):
        load_shadows(net, tmp_path)


def test_factories():
    made = model_factory("audit", "model", "resnet8", num_classes=7, image_shape=(8, 8, 3), width=4)()
    assert isinstance(made, ResNet)
    assert made.head.out_features == 7
    # Only the keywords that it takes are given.
    assert factory("audit", "model", "torch.nn:Identity", num_classes=3)().training
    with pytest.raises(
        ValueError, match="can be called with num_classes and in_channels, or less, got torch.nn:Linear"
    ):
        factory("audit", "model", "torch.nn:Linear", num_classes=3)
    with pytest.raises(ValueError, match="audit: model must name a factory that returns a torch module"):
        model_factory("audit", "model", "argparse:Namespace", num_classes=2, image_shape=(8, 8, 1))


def test_files_that_are_no_state_dict(tmp_path):
    bad = tmp_path / "model.pt"
    bad.write_bytes(b"no weights")
    with pytest.raises(
        UserError, match=r"model must be a readable .safetensors or .pt state dict, got .*model.pt \(.+\)"
    ):
        load_weights(make(), bad, "audit: model")
    model = make()
    torch.save(model.state_dict(), bad)
    load_weights(other := make(), bad, "audit: model")
    assert torch.equal(other.weight, model.weight)
