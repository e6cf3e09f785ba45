"""Clipped sums against a float64 loop over records and against Opacus, and how far one record can move them."""

import copy

import pytest
import torch
from private_cases import clipped, error, gradients, losses, network
from torch import nn

from kr_fast.models import classifier, unet
from kr_fast.privacy import make_private


def private_of(model, **options):
    given = {"noise_multiplier": 0.0, "expected_batch_size": 1.0, **options}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return make_private(model, optimizer, **given)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize(("name", "multiplicity"), [("tokens", 1), ("tokens", 3), ("images", 1), ("images", 2)])
def test_sums_are_those_of_a_loop(name, multiplicity, clipping):
    model, x, labels = network(name)
    part = [slice(first, first + multiplicity) for first in range(0, 6, multiplicity)]
    exact = x.double() if x.is_floating_point() else x
    rows = gradients(model, lambda twin, b: losses(twin, exact[part[b]], labels[part[b]]).mean(), len(part))
    bound = float(rows.norm(dim=1).median())  # some are clipped, some are not
    private = private_of(model, clipping=clipping, multiplicity=multiplicity, max_grad_norm=bound)
    private.backward(losses(model, x, labels))
    assert error(private.state_dict()["sums"], clipped(rows, clipping, bound)) < 1e-5


def test_step_takes_the_mean_over_the_expected_size():
    model, x, labels = network("images")
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    private = private_of(model, expected_batch_size=5.0)
    private.backward(losses(model, x, labels))
    sums = private.state_dict()["sums"]
    private.step()
    torch.testing.assert_close(torch.cat([p.flatten() for p in model.parameters()]), before - sums / 5)
    assert private.steps == 1
    assert not private.state_dict()["sums"].any()


def test_frozen_parameters_stay_and_count_in_no_norm():
    model, x, labels = network("images")
    for name in ("layers.0.weight", "layers.1.bias", "layers.3.weight", "layers.10.weight"):
        model.get_parameter(name).requires_grad_(False)
    rows = gradients(model, lambda twin, b: losses(twin, x[b : b + 1].double(), labels[b : b + 1])[0], 6)
    frozen = model.get_parameter("layers.3.weight")
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), frozen.clone()
    frozen.grad = torch.ones_like(frozen)  # of a training before, without noise
    private = make_private(model, optimizer, noise_multiplier=0.0, expected_batch_size=1.0)
    private.backward(losses(model, x, labels))
    assert error(private.state_dict()["sums"], clipped(rows, "flat", 1.0)) < 1e-5
    private.step()
    assert torch.equal(frozen, before)
    private.restore()
    assert [p.requires_grad for p in model.parameters()].count(False) == 4
    losses(model, x, labels).sum().backward()  # trains as before


@pytest.mark.parametrize(
    ("multiplicity", "frozen"),
    [
        (1, ()),  # whole residual blocks, with skip connections and without
        (2, ()),
        (1, ("down_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.norm1", "up_blocks.0.attentions.0.to_k")),
    ],
)
def test_diffusers_unet(multiplicity, frozen):
    """With attention, a time embedding and class embeddings; 12 px is three tiles of Winograd's algorithm a side."""
    torch.manual_seed(0)
    model = unet(12, 12, 1, 3, widths=(8, 16)).to(memory_format=torch.channels_last)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    x, target, time, y = torch.randn(4, 1, 12, 12), torch.randn(4, 1, 12, 12), torch.rand(4) * 1000, torch.arange(4)

    def denoising(twin, at):
        like = next(twin.parameters())
        found = twin(x[at].to(like), time[at].to(like), class_labels=y[at]).sample
        return (found - target[at].to(like)).square().mean((1, 2, 3))

    parts = [slice(first, first + multiplicity) for first in range(0, 4, multiplicity)]
    rows = gradients(model, lambda twin, b: denoising(twin, parts[b]).mean(), len(parts))
    bound = float(rows.norm(dim=1).median())
    before = denoising(model, slice(None))
    private = private_of(model, multiplicity=multiplicity, max_grad_norm=bound)
    after = denoising(model, slice(None))
    torch.testing.assert_close(after, before)
    private.backward(after)
    assert error(private.state_dict()["sums"], clipped(rows, "flat", bound)) < 1e-5
    private.restore()
    assert torch.equal(denoising(model, slice(None)), before)


@pytest.mark.parametrize(
    ("multiplicity", "other"),
    [
        (1, None),
        (3, None),
        (1, lambda model: model.stages[1].bn2.requires_grad_(False)),
        (1, lambda model: model.stages[1].conv1.register_forward_hook(lambda *_: None)),
    ],
    ids=["whole", "multiplicity", "frozen", "hooked"],
)
def test_blocks_of_classifiers(multiplicity, other):
    """Of one function each, which has a strided shortcut in two of three; and by their modules."""
    model, x, labels = network("resnet")
    if other is not None:
        other(model)
    parts = [slice(first, first + multiplicity) for first in range(0, 6, multiplicity)]
    rows = gradients(model, lambda twin, b: losses(twin, x[parts[b]].double(), labels[parts[b]]).mean(), len(parts))
    bound, before = float(rows.norm(dim=1).median()), losses(model, x, labels)
    private = private_of(model, multiplicity=multiplicity, max_grad_norm=bound)
    after = losses(model, x, labels)
    torch.testing.assert_close(after, before)
    private.backward(after)
    assert error(private.state_dict()["sums"], clipped(rows, "flat", bound)) < 1e-5
    private.restore()
    assert torch.equal(losses(model, x, labels), before)


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 5), (0, 8, 5, 5), (0, 8, 2, 3, 4)])
def test_group_norms_of_no_rows(shape):
    model = nn.GroupNorm(2, 8)
    private_of(model)
    assert model(torch.zeros(shape)).shape == shape


def test_layers_that_no_loss_reaches_are_named(caplog):
    """Under no_grad, but not frozen: noise would move a network that was trained elsewhere."""
    model, x, labels = network("images")
    private = private_of(model)
    for _ in range(2):
        with torch.no_grad():
            features = model.layers[:4](x)
        private.backward(nn.functional.cross_entropy(model.layers[4:](features), labels, reduction="none"))
    assert [each.message for each in caplog.records] == [
        "make_private: 3 trained layers, of which the first is layers.0, had no part in the first losses: "
        "freeze what no loss reaches, for noise moves it"
    ]


def test_encoder_layers_in_evaluation_mode():
    """Of torch, which take their parameters past the layers where none requires a gradient."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder.self_attn.requires_grad_(False)
    model, x, labels = (
        nn.Sequential(encoder, nn.Flatten(), nn.Linear(32, 3)).eval(),
        torch.randn(6, 4, 8),
        torch.arange(6) % 3,
    )
    rows = gradients(model, lambda twin, b: losses(twin, x[b : b + 1].double(), labels[b : b + 1])[0], 6)
    private = private_of(model)
    private.backward(losses(model, x, labels))
    assert error(private.state_dict()["sums"], clipped(rows, "flat", 1.0)) < 1e-5


def test_opacus_has_the_same_sums():
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = classifier("resnet8-gn", num_classes=3, in_channels=1, width=8, image_size=8)
    x, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
    theirs = opacus.GradSampleModule(copy.deepcopy(model))
    nn.functional.cross_entropy(theirs(x), labels).backward()  # a mean, which Opacus takes back
    rows = torch.cat([p.grad_sample.flatten(1) for p in theirs.parameters()], 1)
    private = private_of(model)
    private.backward(losses(model, x, labels))
    assert error(private.state_dict()["sums"], clipped(rows.double(), "flat", 1.0)) < 1e-5


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_sensitivity(clipping):
    """One record more or less moves the sum by the bound at most: 100 random networks and batches."""
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for seed in range(50):
        torch.manual_seed(seed)
        width, outputs = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
        conv = nn.Conv2d(1, 2 * width, 3, padding=seed % 2, stride=1 + seed % 3)
        model = nn.Sequential(conv, nn.GroupNorm(2, 2 * width), nn.Tanh(), nn.Flatten(), nn.LazyLinear(outputs))
        x = torch.randn(5, 1, 6, 6) * 10 ** float(torch.randint(-3, 4, (), generator=generator))
        model(x)
        bound = 10 ** float(torch.randint(-2, 3, (), generator=generator))
        private = private_of(model, max_grad_norm=bound, clipping=clipping)
        fresh, sums = private.state_dict(), []
        for present in (torch.ones(5, dtype=torch.bool), torch.arange(5) != seed % 5):
            private.load_state_dict(fresh)
            private.backward(model(x).square().sum(1), present=present)
            sums.append(private.state_dict()["sums"].double())
        moved = float((sums[0] - sums[1]).norm()) / bound
        largest = max(largest, moved)
        assert moved <= 1 + 1e-5
    assert largest > 0.99


def test_copies_of_a_model_hold_no_sums():
    model, x, labels = network("images")
    private = private_of(model)
    private.backward(losses(model, x, labels))
    twin = copy.deepcopy(model).eval()
    for p in model.parameters():
        p.data.zero_()
    assert twin(x).any()  # by weights of its own
    layers = [each.forward.args[0] for each in twin.modules() if "forward" in vars(each)]
    assert len(layers) == 7
    assert not any(each.any() for layer in layers for each in layer.sums.values())
