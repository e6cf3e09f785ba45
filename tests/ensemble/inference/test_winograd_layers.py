"""What a 3x3 convolution takes with it when it runs by Winograd's algorithm, and what it leaves alone."""

import pytest
import torch
from small_networks import exact_logits, images_of
from torch import nn

from kr_fast.backends import native
from kr_fast.ensemble import ModelArray

pytestmark = pytest.mark.skipif(native.isa() == "scalar", reason="torch's are faster without vectors")


def network(*trunk):
    """Convolutions of 16 outputs in front, whatever ``trunk`` leaves behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), *trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(2, 3, 32, 32))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(-2, 2)  # below 0: the maximum becomes a minimum
    return model.eval()


def conv(inputs=16, outputs=20, **options):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})


# What follows the first convolution.
TAKEN = {
    "pool": (conv(), nn.MaxPool2d(2)),
    "pool, norm": (conv(bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(20)),
    "pool, norm, GELU": (conv(), nn.MaxPool2d(2, 2), nn.BatchNorm2d(20), nn.GELU()),
    "pool, SiLU": (conv(), nn.MaxPool2d(2), nn.SiLU()),
    "pool, tanh": (conv(), nn.MaxPool2d(2), nn.Tanh()),
    "ReLU, pool": (conv(), nn.ReLU(), nn.MaxPool2d(2)),
    "norm, ReLU, pool": (conv(), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)),
    "norm, pool, norm": (conv(), nn.BatchNorm2d(20), nn.MaxPool2d(2), nn.BatchNorm2d(20)),
    "40 outputs": (conv(outputs=40), nn.MaxPool2d(2), nn.BatchNorm2d(40), nn.ReLU()),
    "odd sides": (nn.Conv2d(16, 16, 2), conv(), nn.MaxPool2d(2), nn.GELU()),
    "hardswish": (conv(), nn.Hardswish()),
    "tanh GELU": (conv(), nn.GELU("tanh")),
}
LEFT = {
    "GELU, pool": (conv(), nn.GELU(), nn.MaxPool2d(2)),  # GELU is not monotone
    "overlapping": (conv(), nn.MaxPool2d(3, 2)),
    "padded": (conv(), nn.MaxPool2d(2, 2, padding=1)),
    "ceil": (nn.Conv2d(16, 16, 2), conv(), nn.MaxPool2d(2, ceil_mode=True)),
    "ReLU, pool, norm": (conv(), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(20)),  # norm stands alone
}
NOT_WINOGRAD = {
    "stride": (conv(stride=2),),
    "dilation": (conv(dilation=2, padding=2),),
    "groups": (conv(groups=4),),
    "no border": (conv(padding=0),),
    "reflected border": (conv(padding_mode="reflect"),),
    "few inputs": (nn.Conv2d(16, 8, 1), conv(8)),
    "5x5": (nn.Conv2d(16, 20, 5, padding=2),),
}


def answers(model, **options):
    images = images_of(20)
    want = exact_logits([model], images)
    array = ModelArray([model], **options)
    result = array(images)
    (program,) = array.runners.values()
    assert float((result.double() - want).abs().max()) <= 2e-5 * (1 + float(want.abs().max()))
    return program


def winograd_layers(program):
    return [layer for layer in program.layers.values() if layer.winograd]


@pytest.mark.parametrize("name", TAKEN)
def test_what_follows_is_taken(name):
    program = answers(network(*TAKEN[name]))
    (layer,) = winograd_layers(program)
    assert layer.pool == ("pool" in name or name in ("40 outputs", "odd sides"))
    kinds = [each.kind for each in program.layers.values()]
    assert kinds == ["conv"] * (3 if name == "odd sides" else 2) + ["linear"]
    assert not [n for n in program.nodes if n.op == "call_module" and "Pool" in str(n.target)]
    assert sum(n.op == "call_module" for n in program.nodes) <= len(kinds) + 1  # and flatten


@pytest.mark.parametrize("name", sorted(TAKEN.keys() - {"odd sides"}))  # a 2x2 convolution more
def test_bfloat16_is_not_used_where_winograd_is_faster(name):
    """Image, logits and these convolutions: nothing is left in bfloat16, and the answers are as close as in float32."""
    answers(network(*TAKEN[name]), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_stays(name):
    program = answers(network(*LEFT[name]))
    (layer,) = winograd_layers(program)
    assert layer.pool == (name == "ReLU, pool, norm")
    assert layer.pool_norm is None


@pytest.mark.parametrize("name", NOT_WINOGRAD)
def test_other_convolutions_stay(name):
    assert not winograd_layers(answers(network(*NOT_WINOGRAD[name])))


class Residual(nn.Module):
    """The sum of a convolution with its input, which a second branch reads too."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.norm, self.activation = conv(16, 16), nn.BatchNorm2d(16), activation

    def forward(self, x):
        return torch.cat([self.activation(self.norm(self.conv(x)) + x), x], 1)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity()], ids=["relu", "gelu", "none"])
def test_residual_sums_leave_their_input_alone(activation):
    (layer,) = winograd_layers(answers(network(Residual(activation))))
    assert layer.add
    assert not layer.in_place


def test_bits_do_not_follow_the_chunk():
    model, images = network(*TAKEN["pool, norm, GELU"], conv(20, 40)), images_of(50)
    want = ModelArray([model], chunk=50)(images)
    for chunk in (1, 3, 16, 64):
        assert torch.equal(ModelArray([model], chunk=chunk)(images), want)


def test_float64_and_machines_without_vectors_take_the_definition(monkeypatch):
    model = network(*TAKEN["pool"])
    assert not winograd_layers(answers(model, dtype=torch.float64))
    for isa in (None, "scalar"):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        assert not winograd_layers(answers(model))
