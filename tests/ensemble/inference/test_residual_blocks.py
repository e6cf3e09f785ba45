"""Residual blocks of a GPU's program as one kernel: what is found, its numbers, and when it is taken."""

import functools
import logging

import pytest
import torch
from cuda_on_host import in_use
from small_networks import BasicBlock, exact_logits, images_of, models_of
from torch import nn

from kr_fast.backends import registry
from kr_fast.backends.cuda import batched as cuda
from kr_fast.ensemble import ModelArray
from kr_fast.ensemble.inference import autotune, build
from kr_fast.ensemble.inference.autotune import Tile
from kr_fast.ensemble.inference.residual_blocks import BatchedResidualBlock
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
# network -> the second convolutions of its blocks, and how many layers a block has
FOUND = {
    "resnet8": ({"stages.0.conv2": 2}, "stages.1.conv2"),
    "torchvision": ({"layers.0.conv2": 2, "layers.2.conv2": 2}, "layers.1.conv2"),
    "wide": ({"blocks.1.conv2": 3}, "blocks.0.conv2"),
}


@pytest.fixture(autouse=True)
def batched(monkeypatch):
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu",))


def array_of(name, count=2, **more):
    return ModelArray(models_of(name, count), kernels="own", chunk=8, **more)


def program_of(array):
    return next(iter(array.runners.values())).program


def as_blocks(array, images):
    """The array with all blocks run as one."""
    array(images)
    program = program_of(array)
    assert program.blocks
    program.kernels = program.only(dict.fromkeys(program.kernels, "block"))
    return array


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name):
    array = array_of(name)
    array(images_of(4))
    program = program_of(array)
    assert {whole.names[-1]: len(whole.nodes) for whole in program.blocks.values()} == FOUND[name][0]
    assert FOUND[name][1] in program.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_logits_are_those_of_the_layers(name, dtype):
    images, labels = images_of(11), torch.arange(11) % 5
    want = exact_logits(models_of(name, 2), images)
    array = as_blocks(array_of(name, dtype=dtype), images)
    phi = array.signals(images, labels)["phi"][0].T.double()
    exact = torch.stack([membership_signals(z.float(), labels)["phi"].double() for z in want])
    assert float((phi - exact).abs().max()) <= (1e-4 if dtype == torch.float32 else 2e-2)
    layers = array_of(name, dtype=dtype)(images)
    assert float((array(images) - layers).abs().max()) <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", ["torchvision", "wide"])
def test_by_the_cuda_kernel(name, host_cuda):
    """Its source on the CPU within the whole program; the rest by the reference."""
    images = images_of(3)
    want = array_of(name, dtype=torch.float16)(images)
    array, calls = as_blocks(array_of(name, dtype=torch.float16), images), []
    kernel = cuda.model_residual_block

    def by_cuda(*arguments):
        calls.append(arguments)
        with in_use(host_cuda):
            return kernel(*arguments)

    with registry.added("model_residual_block", "reference", by_cuda):
        got = array(images)
    assert len(calls) == len(FOUND[name][0])
    assert float((got - want).abs().max()) <= 1e-2


class Unlike(nn.Module):
    """What resembles a block: an activation other than ReLU, no zeros around, a middle that is read twice, a sum with
    something else, with something that was written into, and one block that is used twice."""

    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(11)]
        self.stem, self.c, self.twice = nn.Conv2d(3, 16, 3, 2, 1), nn.ModuleList(convolutions), BasicBlock(16, 16)
        self.odd, self.head = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.c[1](torch.nn.functional.silu(self.c[0](x))))
        x = torch.relu(x + self.odd(torch.relu(self.c[2](x))))
        middle = torch.relu(self.c[3](x))
        x = torch.relu(x + self.c[4](middle)) + middle
        x = torch.relu(2 * x + self.c[6](torch.relu(self.c[5](x))))
        x = torch.nn.functional.silu(x + self.c[8](torch.relu(self.c[7](x))))
        middle = torch.relu(self.c[9](x))
        x.mul_(0.5)
        x = torch.relu(self.c[10](middle) + x)
        return self.head(self.twice(self.twice(x)).mean((2, 3)))


def test_what_resembles_a_block():
    models, images = [], images_of(5)
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Unlike().eval())
    array = ModelArray(models, kernels="own", chunk=4)
    got = array(images)
    assert [whole.names for whole in program_of(array).blocks.values()] == [["c.7", "c.8"]]  # its SiLU stands alone
    program = program_of(array)
    program.kernels = program.only(dict.fromkeys(program.kernels, "block"))
    assert program.kernels["twice.conv1"] == "own:0"
    want = exact_logits(models, images)
    for result in (got, array(images)):
        assert float((result.double() - want).abs().max()) <= 2e-5 * (1 + float(want.abs().max()))


@pytest.mark.parametrize("wins", [True, False])
def test_the_faster_is_taken_and_recorded(wins, monkeypatch, tmp_path):
    """By a clock of ours: a layer takes 1, a block a little less or more than its layers."""

    def clock(run, device):
        run()
        return (2.9 if wins else 3.1) if "block" in run.__code__.co_freevars else 1.0

    monkeypatch.setattr(build, "choose", functools.partial(autotune.choose, timer=clock))
    monkeypatch.setattr(build, "tiles", lambda *_: [Tile(2, 4)])
    images, labels = images_of(6), torch.arange(6) % 5
    array = ModelArray(models_of("wide", 2))
    first = array.signals(images, labels, path=tmp_path)["phi"].clone()
    layers = next(iter(array.runners.values())).record["layers"]
    taken = {name for name, kernel in layers.items() if kernel == "block"}
    assert taken == ({"blocks.1.bn1", "blocks.1.conv1", "blocks.1.conv2"} if wins else set())
    again = ModelArray(models_of("wide", 2), kernels="own")  # which would not choose it
    assert torch.equal(again.signals(images, labels, path=tmp_path)["phi"], first)
    assert next(iter(again.runners.values())).record["layers"] == layers


def failing(self, group, x):
    raise RuntimeError("CUDA launch failed: invalid argument")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda self, group, x: torch.zeros_like(x), "these kernels give other logits and are not used"),
        (failing, "layers.0.conv1 + layers.0.conv2 runs by its layers' kernels: CUDA launch failed: invalid argument"),
    ],
    ids=["wrong", "failing"],
)
def test_a_kernel_that_does_not_work_is_not_used(run, message, monkeypatch, caplog):
    """What was chosen by its speed is checked; models are batched all the same."""
    monkeypatch.setattr(BatchedResidualBlock, "run", run)
    monkeypatch.setattr(build, "choose", functools.partial(autotune.choose, timer=lambda run, _: run() is None or 1.0))
    models, images = models_of("torchvision", 2), images_of(4)
    array = ModelArray(models)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        got = array(images)
    assert message in caplog.text
    assert "block" not in program_of(array).kernels.values()
    assert torch.allclose(got.double(), exact_logits(models, images), atol=1e-4)


def test_a_recorded_kernel_that_does_not_work_is_refused(monkeypatch, tmp_path):
    images, labels = images_of(4), torch.arange(4) % 5
    array = as_blocks(array_of("torchvision"), images)
    array.signals(images, labels, path=tmp_path)
    monkeypatch.setattr(BatchedResidualBlock, "run", lambda self, group, x: torch.zeros_like(x))
    with pytest.raises(UserError, match=r"kernels must give the answers that the record's gave, got .*conv2.*block"):
        array_of("torchvision").signals(images, labels, augment="flip", path=tmp_path)
