"""Networks that do what a forward may do, one trait each."""

import torch
import torch.nn.functional as F
from torch import nn


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
    layers = [PlainConv(3, 16, 3, padding=1, bias=False), PlainNorm(16), PlainAct(inplace=True), nn.MaxPool2d(2)]
    layers += [OwnConv(16, 16, 3, padding=1, bias=False), NormAct(16), nn.Identity(), DoubledConv(16, 16, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), OwnLinear(16, 5))


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


_TRACED = (Defaults, Constants, OwnTensors, Parametrized, InPlace, Views, Shared, Attention, SmallPixels, Forwarded)
TRACED = {make.__name__: make for make in (*_TRACED, Sparse, subclasses)}
TRACED["graph"] = lambda: torch.fx.symbolic_trace(Plain())


class Branches(Body):
    def forward(self, x):
        x = self.first(x)
        return self.end(x if x.mean() > 100 else 2 * x)


class Asserts(Body):
    def forward(self, x):
        assert x.shape[1] == 3
        return self.end(self.first(x))


class BareAssert(Body):
    """An error without words, from a forward that meets a proxy."""

    def forward(self, x):
        assert isinstance(x, torch.Tensor)
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
        self.conv.register_forward_hook(lambda part, given, result: result * 2)

    def forward(self, x):
        return self.end(self.first(x))


class Neighbours(Body):
    """An answer that depends on the images beside it."""

    def forward(self, x):
        x = self.first(x)
        return self.end(x - x.mean(0, keepdim=True))


OTHER = "does not give its answers"
OWN = {
    Branches: "control flow",
    Asserts: "control flow",
    BareAssert: r"cannot trace it \(AssertionError\)",
    OtherConstants: f"{OTHER} for model 1",
    OtherScale: f"{OTHER} for model 1",
    Called: OTHER,
    OtherTensors: f"{OTHER} for model 1",
    Counts: "changes seen",
    Replaces: "changes seen",
    WritesInput: "writes into its input",
    Hooked: "conv has forward hooks",
    Neighbours: OTHER,
}
OWN = {make.__name__: (make, why) for make, why in OWN.items()}
OWN["scripted"] = (lambda: torch.jit.script(Plain()), "cannot trace it")
