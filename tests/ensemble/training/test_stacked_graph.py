"""A module's forward on stacks: the module's own logits, gradients and statistics in float64, and what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F
from small_networks import Airbench, Branching, TorchvisionResNet, WideResNet, efficientnet, normed
from torch import nn

from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.training.layer_ops import unstacked
from kr_fast.ensemble.training.stacked_graph import StackedGraph
from kr_fast.ensemble.training.state import TrainingState
from kr_fast.ensemble.training.verify import check
from kr_fast.models import classifier

NETWORKS = {
    "resnet8": functools.partial(classifier, "resnet8", num_classes=5, in_channels=3),
    "torchvision": TorchvisionResNet,
    "airbench": Airbench,
    "normed": normed,
}


def check_of(make, side=32):
    torch.manual_seed(0)
    model = make()
    check(model, StackedGraph(model), torch.randn(4, 3, side, side), 5)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_float64(name):
    """Logits, gradients and running statistics of one step against the module's own: see training/verify.py."""
    check_of(NETWORKS[name])


@pytest.mark.parametrize("name", [*NETWORKS, "odd"])
def test_bfloat16_products_of_float32_weights(name):
    """Logits and gradients are as near to float32's as those of torch's autocast; gradients are float32."""
    torch.manual_seed(0)
    model = (NETWORKS | {"odd": Odd})[name]().train()
    graph, x = StackedGraph(model), torch.randn(2, 8, 3, 32, 32)
    state = TrainingState([model, model], graph, torch.device("cpu"), 0.0)

    def stacks(dtype):
        logits, seen = graph(state.tensors, x.to(dtype))
        assert logits.dtype == dtype
        assert all(mean.dtype == torch.float32 for mean, _, _ in seen)
        grads = torch.autograd.grad(logits.float().square().sum(), state.leaves())
        assert all(grad.dtype == torch.float32 for grad in grads)
        names = zip(state.names, grads, strict=True)
        return logits[0], [unstacked(grad, name in graph.channels_last)[0] for name, grad in names]

    def torchs(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x[0])
        return logits, torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))

    exact, ours, peers = (flat(*each) for each in (torchs(False), stacks(torch.bfloat16), torchs(True)))
    torch.testing.assert_close(flat(*stacks(torch.float32)), exact, rtol=1e-3, atol=1e-3)
    for a, b, want in zip(ours, peers, exact, strict=True):
        assert float((a - want).norm()) < 1.5 * float((b - want).norm()) + 0.01 * float(want.norm())


def flat(logits, grads):
    return logits.detach().float().flatten(), torch.cat([grad.flatten() for grad in grads])


def test_a_sliced_shortcut_is_a_strided_convolution():
    graph = StackedGraph(NETWORKS["resnet8"]())
    assert [node.target for node in graph.jumps] == ["stages.1.shortcut.0", "stages.2.shortcut.0"]


def test_blocks_with_squeeze_and_excite():
    """Depthwise convolutions, products of unlike shapes, BatchNorm1d, and a Dropout that drops nothing."""

    def make():
        model = efficientnet()
        model[8].p = 0.0
        return model

    check_of(make)


class Odd(nn.Module):
    """Asks for sizes, writes into its values, pools by functions, concatenates, and has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(2 * 8 * 9, 5)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = self.norm(self.conv(x))
        y = F.relu(x, inplace=True)
        y = y + x  # which the ReLU has written into
        y += 1
        y = torch.cat([y * self.scale, F.max_pool2d(x, 3, 1, 1)], 1)
        y = F.adaptive_avg_pool2d(y, 3)
        return self.head(y.view(y.size(0), -1)).mul_(0.5)


def test_anything_that_has_a_trace():
    check_of(Odd, 12)


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(432, 5))
    model[1].weight = model[0].weight
    return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(432, 5)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.norm(x))).flatten(1))


def cumulative():
    return nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(432, 5))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.spare = nn.Linear(432, 5), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x.flatten(1))


class Flag(nn.Module):
    """A forward that the trace takes for something else: it counts its calls."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(432, 5), 0

    def forward(self, x):
        self.calls += 1
        return self.head(x.flatten(1)) * self.calls


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tied, "share a parameter"),
        (Twice, "called twice"),
        (cumulative, "fixed momentum"),
        (Idle, "spare.weight takes no part"),
        (Branching, "cannot trace"),
        (WideResNet, "draws random numbers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), "not logits of 5 classes"),
    ],
)
def test_what_cannot_be_stacked_is_refused(make, words):
    with pytest.raises(Unsupported, match=words):
        check_of(make, 12)


def test_a_trace_that_does_not_follow_is_found_out():
    model, x = Flag(), torch.randn(4, 3, 12, 12)
    graph = StackedGraph(model)
    model(x)
    with pytest.raises(Unsupported, match="does not give its answers"):
        check(model, graph, x, 5)
