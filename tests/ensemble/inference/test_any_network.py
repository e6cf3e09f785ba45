"""ModelArray on whatever a forward may do: it runs, by its trace or by its own forward with one line, as eager does."""

import copy
import functools
import logging
import re

import pytest
import small_networks
import torch
import torch.nn.functional as F
from any_networks import OWN, TRACED, Body, Counts, NormAct, OwnLinear, OwnTensors, PlainNorm, subclasses
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import exact_logits as loop
from small_networks import models_of
from torch import nn

from kr_fast.ensemble import ModelArray
from kr_fast.runtime.errors import UserError

images_of = functools.partial(small_networks.images_of, size=8)


def check_close(result, expected):
    assert float((result.double() - expected).abs().max()) <= 2e-5 * (1 + float(expected.abs().max()))


@pytest.mark.parametrize("name", TRACED)
def test_traced(name, caplog):
    models, images = models_of(TRACED[name], 3), images_of(7)
    expected = loop(models, images, torch.float32 if name == "Forwarded" else torch.float64)  # its copy calls the first
    before = [sorted(vars(part)) for part in models[0].modules()]
    with caplog.at_level(logging.WARNING, "kr_fast"):
        result = ModelArray(models)(images)
    assert not caplog.records
    check_close(result, expected)
    assert [sorted(vars(part)) for part in models[0].modules()] == before
    order = torch.tensor([3, 0, 6])
    alone = ModelArray(models[::-1], chunk=2)(images[order]).flip(0)
    if name not in ("Attention", "Defaults", "Sparse"):  # functions of torch's own
        assert torch.equal(alone, result[:, order])
    check_close(alone, expected[:, order])


@pytest.mark.parametrize("name", OWN)
def test_by_its_own_forward(name, caplog):
    make, why = OWN[name]
    models, images = models_of(make, 3), images_of(7)
    expected = loop(models, images)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        result = ModelArray(models)(images)
    check_close(result, expected)
    (record,) = caplog.records
    assert record.getMessage().startswith("ModelArray: models run one by one in their own forward: ")
    assert "\n" not in record.getMessage()
    assert re.search(why, record.getMessage())


def test_subclasses_are_folded():
    array = ModelArray(models_of(subclasses, 1))
    array(images_of(2))
    (program,) = array.runners.values()
    layers = [(layer.kind, layer.norm, (layer.activation or ("",))[0]) for layer in program.layers.values()]
    assert layers == [("conv", "1", "relu"), ("conv", "5", "swish"), ("linear", None, "")]
    left = [node.target for node in program.nodes if node not in program.layers and node not in program.fixed]
    assert [str(target) for target in left[1:]][:1] == ["3"]  # the pooling; then the other convolution's function
    assert len(left) == 5


def test_what_follows_from_weights_alone_is_computed_once():
    calls = []
    models = models_of(OwnTensors, 2)
    array = ModelArray(models, chunk=2)
    array(images_of(2))
    (program,) = array.runners.values()
    steps = [node for node in program.nodes if node not in program.fixed]
    assert not [
        node for node in steps if node.target in ("std", "mean", "reshape", "repeat") and node.args[0].op != "x"
    ]
    for node in program.nodes:
        if node.target == "std":
            node.target = "var"  # bound programs hold what they computed
            calls.append(node)
    assert len(calls) == 1
    check_close(array(images_of(6)), loop(models, images_of(6)))


def test_a_graph_has_no_proxies_left_in_its_model():
    class Keeps(Body):
        def forward(self, x):
            self.features = self.first(x)
            self.conv.seen = x
            return self.end(self.features)

    (model,) = models_of(Keeps, 1)
    ModelArray([model])(images_of(2))
    copy.deepcopy(model)
    assert isinstance(model.features, torch.Tensor)
    assert isinstance(model.conv.seen, torch.Tensor)


def test_buffers_are_left_as_the_images_make_them():
    models, images = models_of(Counts, 2), images_of(5)
    array = ModelArray(models)
    array(images)
    assert [float(model.seen) for model in models] == [5.0, 5.0]  # and not what was tried first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["Defaults", "OwnTensors", "subclasses", "SmallPixels", "Branches"])
def test_other_dtypes(name, dtype):
    make = TRACED[name] if name in TRACED else OWN[name][0]
    models, images = models_of(make, 2), images_of(5)
    expected = loop(models, images)
    result = ModelArray(models, dtype=dtype)(images).double()
    room = 1e-6 if dtype == torch.float64 else 0.05
    assert float((result - expected).abs().max()) <= room * (1 + float(expected.abs().max()))


def test_networks_that_give_no_logits_are_refused_in_one_line():
    class Pair(Body):
        def forward(self, x):
            return self.end(self.first(x)), x

    class Named(Body):
        def forward(self, x):
            return {"logits": self.end(self.first(x)), "x": x}

    class One(Body):
        def forward(self, x):
            return self.end(self.first(x))[:, :1]

    class Fails(Body):
        def forward(self, x):
            raise AssertionError

    for make, words in (
        (Pair, "got a tuple"),
        (Named, "got a dict"),
        (One, r"got \[2, 1\]"),
        (Fails, "error"),
    ):
        with pytest.raises(UserError, match=f"ModelArray: models must return .*{words}") as caught:
            ModelArray([make()])(images_of(2))
        assert "\n" not in str(caught.value)


# One pixel to a few; taps that see the border alone on either side, on both, on none; more zeros than the filter needs.
GEOMETRY = {name: st.tuples(st.integers(1, n), st.integers(1, n)) for name, n in (("size", 4), ("kernel", 5))}
GEOMETRY |= {"padding": st.tuples(st.integers(0, 3), st.integers(0, 3)), "groups": st.sampled_from([1, 2, 4])}
AFTER = {"residual": st.booleans(), "activation": st.sampled_from([nn.ReLU, nn.GELU, nn.Identity])}


@given(stride=st.integers(1, 3), dilation=st.integers(1, 2), **GEOMETRY, **AFTER)
@settings(max_examples=40, deadline=None)
def test_filters_on_few_pixels(size, kernel, stride, padding, dilation, groups, residual, activation):
    sides = [(n + 2 * p - dilation * (k - 1) - 1) // stride + 1 for n, p, k in zip(size, padding, kernel, strict=True)]
    if min(sides) < 1:
        return

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups)
            self.norm, self.act, self.head = nn.BatchNorm2d(4), activation(), nn.Linear(4, 5)

        def forward(self, x):
            x = self.first(x)
            y = self.norm(self.conv(x))
            return self.head(self.act(y + x if residual and y.shape == x.shape else y).mean((2, 3)))

    models, images = models_of(Net, 1), images_of(3, size=4)[:, : size[0], : size[1]].contiguous()
    array = ModelArray(models)
    check_close(array(images), loop(models, images))


class Assembled(nn.Module):
    """Steps of several styles in the order that a test draws."""

    def __init__(self, steps):
        super().__init__()
        self.steps, width = steps, 4
        self.stem, self.parts = nn.Conv2d(3, width, 3, padding=1), nn.ModuleList()
        for step in steps:
            self.parts.append(PARTS[step](width))
        self.head = nn.Linear(width, 5)

    def forward(self, x, scale=1.0):
        x = self.stem(x)
        for step, part in zip(self.steps, self.parts, strict=True):
            x = FORWARDS.get(step, lambda part, x: part(x))(part, x)
        return self.head(x.mean((2, 3)) * scale)


PARTS = {
    "conv norm relu": lambda n: nn.Sequential(nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), nn.ReLU(inplace=True)),
    "strided": lambda n: nn.Sequential(nn.Conv2d(n, n, 3, 2, 1, bias=False), PlainNorm(n), nn.Hardswish()),
    "residual": lambda n: nn.Sequential(nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)),
    "sum": lambda n: nn.Conv2d(n, n, 1),
    "excite": lambda n: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, n, 1), nn.Sigmoid()),
    "tokens": lambda n: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.GELU(), OwnLinear(n, n)),
    "shuffle": lambda n: nn.Identity(),
    "pool": lambda n: nn.MaxPool2d(2, ceil_mode=True),
    "normact": NormAct,
    "split": lambda n: nn.Conv2d(n // 2, n // 2, 3, padding=1, groups=2),
    "constant": lambda n: nn.Dropout2d(0.5),
    "group norm": lambda n: nn.GroupNorm(2, n),
}
FORWARDS = {
    "residual": lambda part, x: F.relu(part(x) + x),
    "sum": lambda part, x: x.add(part(x)),
    "excite": lambda part, x: x * part(x),
    "tokens": lambda part, x: x + part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "shuffle": lambda part, x: x.view(x.shape[0], 2, 2, x.shape[2], -1).transpose(1, 2).reshape(x.shape),
    "split": lambda part, x: torch.cat([x[:, ::2], part(x.chunk(2, 1)[1])], 1),
    "constant": lambda part, x: part(x) * torch.tensor(0.75),
}


@given(steps=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=6), size=st.sampled_from([1, 4, 7, 8]))
@settings(max_examples=30, deadline=None)
def test_assembled_networks(steps, size):
    models, images = models_of(lambda: Assembled(steps), 2), images_of(3, size=size)
    array = ModelArray(models)
    result = array(images)
    expected = loop(models, images)
    # GroupNorm of two numbers is ill-posed.
    torchs = float((loop(models, images, torch.float32) - expected).abs().max())
    assert float((result - expected).abs().max()) <= 20 * torchs + 2e-5 * (1 + float(expected.abs().max()))
    (program,) = array.runners.values()
    assert type(program).__name__ == "Program"
    if size > 1 or "group norm" not in steps:  # torch's GroupNorm takes a single pixel of one image by other code
        assert torch.equal(ModelArray(models[1:], chunk=1)(images[2:]), result[1:, 2:])
