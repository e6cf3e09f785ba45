"""Classifiers and generators: shapes over the sizes that data may have, and gradients against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.models import classifier, most_levels, padded_size, unet
from kr_fast.runtime.errors import UserError


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet20", "resnet32", "resnet8-gn"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3), (65, 3), (129, 1)])
def test_classifier_shapes(name, size, channels):
    model = classifier(name, num_classes=7, in_channels=channels, width=4, image_size=size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_resnet14_has_fourteen_layers():
    model = classifier("resnet14", num_classes=10, in_channels=3, width=16)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(layers) + 1 == 14  # and the linear layer


def test_group_norm_mixes_no_images():
    model = classifier("resnet8-gn", num_classes=3, in_channels=1, width=12, image_size=8)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    groups = {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {4, 8}  # 12 channels are no multiple of 8
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_unknown_classifier():
    with pytest.raises(UserError, match="classifier: name must be one of resnet8"):
        classifier("vgg", num_classes=2, in_channels=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [2, 4, 5, 8, 16])
def test_gradients_in_channels_last(width, threads):
    """Fewer channels than a block of oneDNN holds, the case that a strided 1x1 convolution gets wrong."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(width)
        model = classifier("resnet8", num_classes=3, in_channels=2, width=width, image_size=8)
        x = torch.randn(16, 8, 8, 2).permute(0, 3, 1, 2)
        y = torch.randint(0, 3, (16,))
        gradients = []
        for dtype in (torch.float32, torch.float64):
            twin = classifier("resnet8", num_classes=3, in_channels=2, width=width, image_size=8)
            twin.load_state_dict(model.state_dict())
            twin.to(dtype)
            torch.nn.functional.cross_entropy(twin(x.to(dtype)), y).backward()
            gradients.append([p.grad.double() for p in twin.parameters()])
        for result, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1))
    finally:
        torch.set_num_threads(before)


def test_shortcut_is_a_strided_convolution():
    block = classifier("resnet8", num_classes=3, in_channels=1, width=8, image_size=9).stages[1].eval()
    x = torch.randn(2, 8, 9, 9)
    convolution, norm = block.shortcut
    expected = norm(torch.nn.functional.conv2d(x, convolution.weight, stride=2))
    torch.testing.assert_close(block.shortcut(x[:, :, ::2, ::2]), expected)


@pytest.mark.parametrize(("height", "width", "levels"), [(8, 8, 2), (28, 28, 3), (11, 9, 3), (224, 224, 4)])
def test_padding_lets_every_level_halve(height, width, levels):
    for size in (height, width):
        padded = padded_size(size, levels)
        assert size <= padded < size + 2 ** (levels - 1)
        assert padded % 2 ** (levels - 1) == 0


@pytest.mark.parametrize(("height", "width", "levels"), [(8, 8, 4), (9, 9, 5), (8, 224, 4), (28, 28, 6)])
def test_most_levels_is_what_reflection_allows(height, width, levels):
    assert most_levels(height, width) == levels
    for count, fits in ((levels, True), (levels + 1, False)):
        bottom, right = padded_size(height, count) - height, padded_size(width, count) - width
        try:
            torch.nn.functional.pad(torch.zeros(1, 1, height, width), (0, right, 0, bottom), mode="reflect")
        except RuntimeError:
            assert not fits
        else:
            assert fits


@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.integers(1, 24), min_size=1, max_size=4), side=st.integers(8, 17))
def test_unet_of_any_widths_runs(widths, side):
    """Widths below a head's channels, or without a common divisor; on the meta device, which computes nothing."""
    levels = min(len(widths), most_levels(side, side))
    with torch.device("meta"):
        network = unet(side, side, 1, 3, widths=widths[:levels])
        x = torch.zeros(2, 1, *[padded_size(side, levels)] * 2)
        assert network(x, 10, class_labels=torch.zeros(2, dtype=torch.int64)).sample.shape == x.shape


def test_unet_is_conditional_on_class_and_time():
    torch.manual_seed(0)
    network = unet(11, 9, 3, 4, widths=(8, 16), layers=1).eval()
    x = torch.randn(2, 3, 12, 10)
    with torch.inference_mode():
        base = network(x, 10.0, class_labels=torch.tensor([0, 0])).sample
        other_class = network(x, 10.0, class_labels=torch.tensor([1, 4])).sample  # 4: the null class of guidance
        other_time = network(x, 500.0, class_labels=torch.tensor([0, 0])).sample
    assert base.shape == x.shape
    assert not torch.allclose(base, other_class)
    assert not torch.allclose(base, other_time)
