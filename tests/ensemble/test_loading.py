"""Models that a user names, and shadows from a folder."""

import functools
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import LogitsOf, TrainConfig, load_shadows, train_shadows
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
    result = load_shadows(net, tmp_path)
    assert torch.equal(result.keep, trained.keep)
    assert torch.equal(result.array(images), trained.array(images))
    (tmp_path / "model-002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="folder must hold 4 models, got no .*model-002.safetensors"):
        load_shadows(net, tmp_path)
    with pytest.raises(ValueError, match=r"load_shadows: model must hold the network's tensors \(weight, ...\), got 1"):
        load_shadows(make, tmp_path)
    np.save(tmp_path / "keep.npy", trained.keep.long().numpy() + 1)
    with pytest.raises(ValueError, match="keep.npy must be bool, or hold 0 and 1 only, got int64"):
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


MODULE = """
import types
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return types.SimpleNamespace(logits=self.head(x.flatten(1)))

def deep(num_classes, depth):
    return Net(num_classes)

def broken():
    raise KeyError("weights")

def picky():
    return nn.Linear(3, 2)

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def passes_on(*, weights=None, **options):
    return Net(**options)

class Zoo:
    @classmethod
    def small(cls, num_classes):
        return Net(num_classes)

network, number = Net(2), 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of modules that nothing else knows of."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text(MODULE)
    (tmp_path / "mine_syntax.py").write_text("def make(:\n")
    (tmp_path / "mine_script.py").write_text("import sys\nsys.exit('usage')\n")
    (tmp_path / "mine_needs.py").write_text("import no_such_package\n")
    (tmp_path / "mine_raises.py").write_text("assert False\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "mine_here:absent",
            "importable pkg.mod:factory, got mine_here:absent (AttributeError: module 'mine",
        ),
        ("mine_here.py:Net", "a module is named as in an import, not as a file)"),
        ("mine_syntax:make", "(SyntaxError: invalid syntax"),
        ("mine_script:make", '(its import ends the program; put what a script does under if __name__ == "__main__")'),
        ("mine_needs:make", "(ModuleNotFoundError: No module named 'no_such_package')"),
        ("mine_raises:make", "(AssertionError)"),
        (":make", "(ValueError: Empty module name)"),
        (".mine_here:Net", "importable pkg.mod:factory, got .mine_here:Net (TypeError"),
        (
            "mine_here:network",
            "name a function or class that makes a network, got mine_here:network, which is the",
        ),
        ("mine_here:number", "got mine_here:number, which is an int"),
        ("mine_here:deep", "got mine_here:deep (missing a required argument: 'depth')"),
        ("mine_here:broken", "name a factory that returns a torch module, got the error KeyError: 'weights'"),
        ("mine_here:picky", "return [N, 2] logits for 8 x 8 x 1 images, got the error mat1 and mat2 shapes cannot be"),
        ("mine_here:lazy", "be a torch module with all its sizes, got a LazyLinear without (1.weight;"),
    ],
)
def test_any_failure_of_a_factory_is_one_line(folder, name, words):
    with pytest.raises(UserError) as caught:
        model_factory("audit", "model", name, num_classes=2, image_shape=(8, 8, 1))
    assert str(caught.value).startswith("audit: model must ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_module_of_the_working_directory(folder):
    """Its output holds the logits, which the factory takes."""
    make_logits = model_factory("audit", "model", "mine_here:Net", num_classes=2, image_shape=(8, 8, 1))
    assert str(folder) in sys.path  # which workers are given
    images, labels = torch.randint(0, 256, (24, 8, 8, 1), dtype=torch.uint8), torch.arange(24) % 2
    shadows = train_shadows(make_logits, images, labels, num_models=2, config=CONFIG, seed=0, out=folder / "shadows")
    assert shadows.array(images).shape == (2, 24, 2)
    assert isinstance(pickle.loads(pickle.dumps(make_logits))(), LogitsOf)
    assert torch.equal(load_shadows(make_logits, folder / "shadows").array(images), shadows.array(images))


@pytest.mark.parametrize("name", ["mine_here:passes_on", "mine_here:Zoo.small"])
def test_keywords_that_are_passed_on_and_methods(folder, name):
    """As torchvision's functions, which pass on ``**kwargs`` to a network that has no in_channels."""
    factory("audit", "model", name, num_classes=5, in_channels=1)  # its import draws numbers
    before = torch.random.get_rng_state()
    make = factory("audit", "model", name, num_classes=5, in_channels=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert make().head.out_features == 5
    assert pickle.loads(pickle.dumps(make))().head.out_features == 5


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
