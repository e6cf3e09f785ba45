"""ModelArray on whatever a forward may do: it runs, by its trace or by its own forward with one line, as eager does."""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kr_fast.data import to_float
from kr_fast.ensemble import ModelArray
from kr_fast.runtime.errors import UserError


class Body(nn.Module):
    """Two convolutions and a head, between which a test puts what it is about."""

    def __init__(self, width=6):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 5)

    def first(self, x):
        return torch.relu(self.norm(self.conv(x)))

    def end(self, x):
        return self.head(self.last(x).mean((2, 3)))


class Defaults(Body):
    def forward(self, x, scale=1.5, is_causal=False, mask=None, *rest, pooled=False, **options):
        x = self.first(x) * scale
        tokens = x.flatten(2).transpose(1, 2)
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask, is_causal=is_causal)
        x = x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.end(x if not pooled and not rest and not options else x * 2)


class Constants(Body):
    def __init__(self):
        super().__init__()
        self.shifts = [torch.tensor([0.25, -0.5]), {"more": torch.linspace(0, 1, 6)[:, None, None]}]

    def forward(self, x):
        x = self.first(x) * torch.tensor(0.5) + torch.arange(8) / 8
        return self.end((x + self.shifts[0][0] * self.shifts[1]["more"]).clamp(max=torch.ones(1)))


class OwnTensors(Body):
    """A buffer, an attribute and a weight, of each model its own, that become what is used on the way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(3))
        self.scale, self.filters = torch.rand(6, 1, 1), nn.Parameter(torch.randn(6, 6, 1, 1))

    def forward(self, x):
        x = self.first(x - self.mean.view(1, 3, 1, 1)) * self.scale
        filters = (self.filters - self.filters.mean((1, 2, 3), True)) / self.filters.std((1, 2, 3), keepdim=True)
        return self.end(F.conv2d(x, filters, self.mean.repeat(2)))


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, which also does what follows it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.3), nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "images")
        mean, var = (None, None) if self.training else (self.running_mean, self.running_var)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training or mean is None, 0.1, self.eps)
        return self.act(self.drop(x))


class OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=self.padding, groups=self.groups)


class PlainConv(nn.Conv2d):
    """Keeps its parent's forward."""


class PlainNorm(nn.BatchNorm2d):
    pass


class PlainAct(nn.ReLU):
    pass


class DoubledConv(nn.Conv2d):
    """Keeps its parent's forward, which runs another function."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def subclasses():
    return nn.Sequential(
        PlainConv(3, 16, 3, padding=1, bias=False), PlainNorm(16), PlainAct(inplace=True), nn.MaxPool2d(2),
        OwnConv(16, 16, 3, padding=1, bias=False), NormAct(16), nn.Identity(),
        DoubledConv(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), OwnLinear(16, 5),
    )  # fmt: skip


class Parametrized(Body):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)
        nn.utils.parametrizations.spectral_norm(self.last)
        self.mixed = nn.utils.parametrizations.orthogonal(OwnLinear(6, 6))

    def forward(self, x):
        return self.end(self.mixed(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class InPlace(Body):
    def forward(self, x):
        x = self.first(x)
        y = self.last(x)
        y += x
        y[:, 0] = 0
        y.mul_(0.5).add_(x[:, :1])
        F.relu_(y)
        bias = self.norm.bias.clone()
        bias[1:] = x.mean((0, 2, 3))[1:] * 0 + 1
        return self.end(y + bias[:, None, None])


class Views(Body):
    """A batch's size in shapes, and views that exist where channels lie first."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(192, 384)

    def forward(self, x):
        x = self.tokens(x.view(x.shape[0], -1)).view(2 * x.size(0) // 2, 6, 8, -1)
        b, c, h, w = x.shape
        x = self.last(x).view(b, 2, c // 2, h * w).transpose(1, 2).reshape(b, c, h, w)
        return self.end(torch.cat([x.new_zeros(b, 0, h, w), x.expand(b, -1, -1, -1)], 1))


class Shared(Body):
    """One convolution and one norm called twice, a weight that two functions read."""

    def forward(self, x):
        x = self.first(x)
        x = torch.relu(self.norm(self.last(x)))
        x = self.norm(self.last(x) + x)
        return self.end(x) + F.linear(x.amax((2, 3)), self.head.weight, self.head.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.layer(x + self.mlp(self.norm(x)))[:, 0])


class SmallPixels(nn.Module):
    """Single pixels, where filters see zeros but for one tap, with all that follows them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 4, 1), nn.InstanceNorm2d(16)
        self.down, self.wide = nn.Conv2d(16, 20, 3, 2, 1), nn.Conv2d(20, 20, 3, 1, 1)
        self.depth, self.point = nn.Conv2d(20, 20, 5, padding=2, groups=20), nn.Conv2d(20, 20, 1)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(20) for _ in range(3)), nn.Linear(20, 5)

    def forward(self, x):
        x = self.down(self.norm(self.stem(x)))
        x = torch.relu(self.norms[0](self.wide(x)) + x)
        x = self.norms[1](self.depth(x)) + x
        return self.head(F.silu(self.norms[2](self.point(x))).flatten(1))


class Forwarded(nn.Module):
    """Objects with a forward other than their class's."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.conv.forward = lambda x: F.conv2d(x, self.conv.weight, self.conv.bias) * 3
        self.forward = lambda x: self.head(self.conv(x).mean((2, 3)))


class Plain(Body):
    def forward(self, x):
        return self.end(self.first(x))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", (torch.rand(5, 192) - 0.9).relu().to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.weight, x.flatten(1).t()).t()


TRACED = {
    "defaults": Defaults, "constants": Constants, "own tensors": OwnTensors, "subclasses": subclasses,
    "parametrized": Parametrized, "in place": InPlace, "views": Views, "shared": Shared, "attention": Attention,
    "small pixels": SmallPixels, "forwarded": Forwarded, "sparse": Sparse,
    "graph": lambda: torch.fx.symbolic_trace(Plain()),
}  # fmt: skip


class Branches(Body):
    def forward(self, x):
        x = self.first(x)
        return self.end(x if x.mean() > 100 else 2 * x)


class Asserts(Body):
    def forward(self, x):
        assert x.shape[1] == 3
        return self.end(self.first(x))


class Silent(Body):
    """An error without words, from a forward that meets a proxy."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise KeyError
        return self.end(self.first(x))


class OtherConstants(Body):
    """Numbers that only Python knows, of each model its own."""

    def __init__(self):
        super().__init__()
        self.table = {"scale": [float(torch.rand(())) + 0.5]}

    def forward(self, x):
        return self.end(self.first(x) * self.table["scale"][0])


class OtherScale(Body):
    def __init__(self):
        super().__init__()
        self.scale = float(torch.rand(())) + 0.5

    def forward(self, x):
        return self.end(self.first(x) * self.scale)


class Called(Body):
    """What its class does around the forward."""

    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return self.end(self.first(x))


class OtherTensors(OtherConstants):
    def __init__(self):
        super().__init__()
        self.table = [torch.rand(6, 1, 1) + 0.5]

    def forward(self, x):
        return self.end(self.first(x) * self.table[0])


class Counts(Body):
    """Its buffer is another at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.end(self.first(x)) + self.seen


class Replaces(Counts):
    def forward(self, x):
        self.seen = self.seen + 1
        return self.end(self.first(x)) * self.seen


class WritesInput(Body):
    def forward(self, x):
        return self.end(self.first(x.mul_(0.5).clamp_(min=-0.25)))


class Hooked(Body):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda part, given, found: found * 2)

    def forward(self, x):
        return self.end(self.first(x))


class Neighbours(Body):
    """An answer that depends on the images beside it."""

    def forward(self, x):
        x = self.first(x)
        return self.end(x - x.mean(0, keepdim=True))


OWN = {
    "branches": (Branches, "control flow"),
    "asserts": (Asserts, "control flow"),
    "silent": (Silent, r"cannot trace it \(KeyError\)"),
    "other constants": (OtherConstants, "does not give its answers for model 1"),
    "other scale": (OtherScale, "does not give its answers for model 1"),
    "called": (Called, "does not give its answers"),
    "scripted": (lambda: torch.jit.script(Plain()), "cannot trace it"),
    "other tensors": (OtherTensors, "does not give its answers for model 1"),
    "counts": (Counts, "changes seen"),
    "replaces": (Replaces, "changes seen"),
    "writes into its input": (WritesInput, "writes into its input"),
    "hooked": (Hooked, "conv has forward hooks"),
    "neighbours": (Neighbours, "does not give its answers"),
}


def models_of(make, count=3):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_(0, 0.3)
                    part.running_var.uniform_(0.3, 2)
                    part.weight.uniform_(0.5, 1.5)
        found.append(model.eval())
    return found


def images_of(count, size=8):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def loop(models, images, dtype=torch.float64):
    """Copies of the models in ``dtype``, on images that lie as torch makes them."""
    with torch.no_grad():
        copies = [copy.deepcopy(model).to(dtype) for model in models]
        return torch.stack([model(to_float(images).contiguous().to(dtype)) for model in copies]).double()


def check_close(found, wanted):
    assert float((found.double() - wanted).abs().max()) <= 2e-5 * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("name", TRACED)
def test_traced(name, caplog):
    models, images = models_of(TRACED[name]), images_of(7)
    wanted = loop(models, images, torch.float32 if name == "forwarded" else torch.float64)  # its copy calls the first
    before = [sorted(vars(part)) for part in models[0].modules()]
    with caplog.at_level(logging.WARNING, "kr_fast"):
        found = ModelArray(models)(images)
    assert not caplog.records
    check_close(found, wanted)
    assert [sorted(vars(part)) for part in models[0].modules()] == before
    order = torch.tensor([3, 0, 6])
    alone = ModelArray(models[::-1], chunk=2)(images[order]).flip(0)
    if name not in ("attention", "defaults", "sparse"):  # functions of torch's own
        assert torch.equal(alone, found[:, order])
    check_close(alone, wanted[:, order])


@pytest.mark.parametrize("name", OWN)
def test_by_its_own_forward(name, caplog):
    make, why = OWN[name]
    models, images = models_of(make), images_of(7)
    wanted = loop(models, images)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        found = ModelArray(models)(images)
    check_close(found, wanted)
    (record,) = caplog.records
    assert record.getMessage().startswith("ModelArray: models run one by one in their own forward: ")
    assert "\n" not in record.getMessage()
    assert re.search(why, record.getMessage())


def test_subclasses_are_folded():
    array = ModelArray(models_of(subclasses, 1))
    array(images_of(2))
    (program,) = array._programs.values()
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
    (program,) = array._programs.values()
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
@pytest.mark.parametrize("name", ["defaults", "own tensors", "subclasses", "small pixels", "branches"])
def test_other_dtypes(name, dtype):
    make = TRACED[name] if name in TRACED else OWN[name][0]
    models, images = models_of(make, 2), images_of(5)
    wanted = loop(models, images)
    found = ModelArray(models, dtype=dtype)(images).double()
    room = 1e-6 if dtype == torch.float64 else 0.05
    assert float((found - wanted).abs().max()) <= room * (1 + float(wanted.abs().max()))


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
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]), residual=st.booleans(),
    activation=st.sampled_from([nn.ReLU, nn.GELU, nn.Identity]),
)  # fmt: skip
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

    models, images = models_of(Net, 1), images_of(3, 4)[:, : size[0], : size[1]].contiguous()
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
    models, images = models_of(lambda: Assembled(steps), 2), images_of(3, size)
    array = ModelArray(models)
    found = array(images)
    wanted = loop(models, images)
    torchs = float((loop(models, images, torch.float32) - wanted).abs().max())  # GroupNorm of two numbers is ill-posed
    assert float((found - wanted).abs().max()) <= 20 * torchs + 2e-5 * (1 + float(wanted.abs().max()))
    (program,) = array._programs.values()
    assert type(program).__name__ == "Program"
    if size > 1 or "group norm" not in steps:  # torch's GroupNorm takes a single pixel of one image by other code
        assert torch.equal(ModelArray(models[1:], chunk=1)(images[2:]), found[1:, 2:])
