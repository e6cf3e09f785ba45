"""The GPU's runner of ModelArray, run on the CPU by its reference kernels: numbers, bits, choices, refusals.

The same calls run on a GPU, where a step is captured; what needs one is marked.
"""

import functools
import logging
import os

import pytest
import torch
from small_networks import NETWORKS, exact_logits, images_of, models_of
from torch import nn

from kr_fast.backends import registry
from kr_fast.ensemble import ModelArray, Query
from kr_fast.ensemble.inference import autotune, build, tiled_runner
from kr_fast.ensemble.inference.autotune import Tile
from kr_fast.ensemble.inference.runner import SignalRequest
from kr_fast.ensemble.inference.tiled_runner import TiledRunner
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.runtime import memory
from kr_fast.runtime.errors import UserError

BATCHED = [name for name in NETWORKS if name != "branching"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu", "cuda"))
    return request.param


pytestmark = pytest.mark.usefixtures("one_thread")


def placed(name, count, device):
    return [model.to(device) for model in models_of(name, count)]


def phi_of(logits, labels):
    return torch.stack([membership_signals(z, labels)["phi"].double() for z in logits.float()])


def runner_of(array):
    (runner,) = array.runners.values()
    assert isinstance(runner, TiledRunner)
    return runner


@pytest.mark.parametrize("kernel", ["own", "loop"])
@pytest.mark.parametrize("name", BATCHED)
def test_logits_and_phi_are_those_of_float64(name, kernel, device):
    models, images, labels = placed(name, 2, device), images_of(7), torch.arange(7) % 5
    want = exact_logits(models_of(name, 2), images)
    array = ModelArray(models, kernels="own", chunk=4)  # a whole chunk and a tail
    if kernel == "loop":
        array(images)
        layers = runner_of(array).program.kernels
        for node, bound in runner_of(array).program.bound.items():
            names = bound.kernels(node.args[0].op == "placeholder")
            layers[bound.layer.module] = names[-1]
        assert "loop" in layers.values()
    got = array(images).cpu().double()
    assert float((got - want).abs().max()) <= 2e-5 * (1 + float(want.abs().max()))
    phi = array.signals(images, labels)["phi"][0].T.double()
    assert float((phi - phi_of(want, labels)).abs().max()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BATCHED)
def test_half_precision(name, dtype, device):
    models, images, labels = placed(name, 2, device), images_of(8), torch.arange(8) % 5
    want = phi_of(exact_logits(models_of(name, 2), images), labels)
    phi = ModelArray(models, dtype=dtype, kernels="own", chunk=8).signals(images, labels)["phi"][0].T.double()
    assert float((phi - want).abs().max()) <= 2e-2


@pytest.mark.parametrize("name", BATCHED)
def test_bits_do_not_follow_company(name, device):
    models, images, labels = placed(name, 3, device), images_of(11), torch.arange(11) % 5
    plain = ModelArray(models, kernels="own", chunk=4).signals(images, labels, augment="flip")["phi"]
    order, others = torch.randperm(11, generator=torch.Generator().manual_seed(2)), [2, 1]
    mixed = ModelArray([models[m] for m in others], kernels="own", chunk=4)
    result = mixed.signals(images[order], labels[order], augment="flip")["phi"]
    assert torch.equal(result, plain[:, order][:, :, others])
    alone = ModelArray(models[2:3], kernels="own", chunk=4).signals(images[:7], labels[:7], augment="flip")["phi"]
    assert torch.equal(alone[:, :, 0], plain[:, :7, 2])


def test_groups_of_models(device, monkeypatch):
    """Groups of two of five models: three of them, the last of one."""
    models, images, labels = placed("resnet8", 5, device), images_of(11), torch.arange(11) % 5
    want = ModelArray(models, kernels="own", chunk=8).signals(images, labels)["phi"]
    monkeypatch.setattr(build, "tiles", lambda *_: [Tile(2, 8)])
    array, seen = ModelArray(models, kernels="own"), []
    result = array.signals(images, labels, want=("phi", "correct"))
    assert [group.stop - group.start for group in runner_of(array).groups] == [2, 2, 1]
    assert torch.equal(result["phi"], want)
    request = SignalRequest(images, labels, (Query(),), ("phi",))
    runner_of(array).signals(request, range(11), result, seen.append)
    assert seen == [2, 2, 2, 2, 1, 1]  # models, once for each group and chunk


def test_queries_are_index_arithmetic(device, monkeypatch):
    models, images, labels = placed("resnet8", 2, device), images_of(6), torch.arange(6) % 5
    array = ModelArray(models, kernels="own", chunk=6, normalize=((0.5, 0.4, 0.3), 0.25))
    result = array.signals(images, labels, augment="lira")["phi"]
    monkeypatch.setattr(build, "BATCHED_DEVICES", ())
    want = ModelArray(models, chunk=6, normalize=((0.5, 0.4, 0.3), 0.25)).signals(images, labels, augment="lira")["phi"]
    assert torch.allclose(result, want, atol=1e-4)
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu", "cuda"))
    cut = ModelArray(models, kernels="own", chunk=6).signals(
        images, labels, augment=[Query(size=(28, 24), down=-1, right=2)]
    )
    whole = ModelArray(models, kernels="own", chunk=6).signals(images[:, 3:31, 2:26].contiguous(), labels)
    assert torch.equal(cut["phi"], whole["phi"])


class Scaled(nn.Module):
    """A parameter of its own, a constant, a module without a kernel, a grouped convolution, a shared layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("halves", torch.full((1, 8, 1, 1), 0.5))

    def forward(self, x):
        x = self.norm(self.grouped(self.conv(x) * self.gamma) * self.halves)
        return self.head((x + self.gamma.abs()).amax((2, 3)))


def test_what_has_no_kernel_runs_model_by_model(device, caplog):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(Scaled().eval())
    images = images_of(10)
    want = exact_logits(models, images)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        array = ModelArray([model.to(device) for model in models], kernels="own", chunk=4)
        got = array(images).cpu().double()
    assert float((got - want).abs().max()) <= 1e-5 * (1 + float(want.abs().max()))
    assert [r.getMessage() for r in caplog.records if "model by model: GroupNorm" in r.getMessage()]
    assert runner_of(array).record["layers"]["grouped"] == "loop"


class Gated(nn.Module):
    """A weight of its own without images, of as many rows as a chunk has images."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.g = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x):
        return self.head((self.conv(x) * torch.sigmoid(self.g)).amax((2, 3)))


class Mixed(nn.Module):
    """A table that is common to the models, scaled by each: of as many rows as a block has pairs."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("mix", torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, x):
        return self.head(self.conv(x).amax((2, 3)) @ (self.mix * self.scale))


@pytest.mark.parametrize(("make", "models", "chunk"), [(Gated, 2, 6), (Mixed, 2, 4), (Mixed, 1, 8)])
def test_a_weight_of_as_many_rows_as_images_is_no_image(make, models, chunk, device):
    made = []
    for seed in range(models):
        torch.manual_seed(seed)
        made.append(make().eval())
    images = images_of(10)
    want = exact_logits(made, images)
    array = ModelArray([model.to(device) for model in made], kernels="own", chunk=chunk)
    got = array(images).cpu().double()
    assert runner_of(array).tile.images == chunk
    assert float((got - want).abs().max()) <= 1e-5 * (1 + float(want.abs().max()))


def test_what_mixes_models_is_noticed(device, caplog):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x).amax((2, 3))
            return self.head(x - x.flip(0))  # of an image the partner, which is another model's

    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        array = ModelArray([Fixed(), Fixed()], kernels="own", chunk=2)
        array(images_of(2))
    assert not isinstance(next(iter(array.runners.values())), TiledRunner)
    assert "models run one after the other: its trace does not give its answers" in caplog.text


def test_what_cannot_be_traced_says_so_once(device, caplog):
    with caplog.at_level(logging.WARNING, "kr_fast"):
        ModelArray(placed("branching", 2, device))(images_of(4))
    assert len(caplog.records) == 1
    assert "one by one" in caplog.text


def test_the_fastest_is_taken_and_recorded(device, monkeypatch):
    """By a clock of ours: the library's kernels win in a step of one model, and that step wins."""
    models, images = placed("efficientnet", 3, device), images_of(9)
    seen = []

    def clock(run, device):
        seen.append(run())
        return 1 / len(seen)  # whatever comes later is faster

    monkeypatch.setattr(build, "choose", functools.partial(autotune.choose, timer=clock))
    monkeypatch.setattr(build, "tiles", lambda *_: [Tile(3, 2), Tile(1, 6)])
    array = ModelArray(models)
    got = array(images)
    record = runner_of(array).record
    assert (record["models"], record["images"]) == (1, 6)
    assert record["layers"]["0"] == "loop"
    assert record["layers"]["12"].startswith("own:")  # a linear layer has no loop
    assert torch.allclose(got.cpu().double(), exact_logits(models_of("efficientnet", 3), images), atol=1e-4)


def test_a_resumed_run_takes_the_recorded_kernels(device, monkeypatch, tmp_path):
    models, images, labels = placed("resnet8", 3, device), images_of(9), torch.arange(9) % 5
    chosen = {}

    def choose(program, candidates, images, view):
        program.kernels = {layer: "loop" for layer in program.kernels if layer != "head"} | {"head": "own:0"}
        chosen.update(program.kernels)
        return Tile(2, 4)

    monkeypatch.setattr(build, "choose", choose)
    first = ModelArray(models).signals(images, labels, path=tmp_path)["phi"].clone()
    monkeypatch.setattr(build, "choose", None)
    array = ModelArray(models, kernels="own")  # whose own choice would be another
    assert torch.equal(array.signals(images, labels, path=tmp_path)["phi"], first)
    assert runner_of(array).record == {"models": 2, "images": 4, "layers": chosen}


def test_a_resumed_run_takes_the_recorded_chunk(device, tmp_path):
    models, images, labels = placed("resnet8", 2, device), images_of(9), torch.arange(9) % 5
    ModelArray(models, kernels="own", chunk=4).signals(images, labels, path=tmp_path)
    with pytest.raises(UserError, match="chunk must be 4, as in the signals that are continued, got 8"):
        ModelArray(models, kernels="own", chunk=8).signals(images, labels, path=tmp_path)
    ModelArray(models, kernels="own", chunk=4).signals(images, labels, path=tmp_path)


def test_images_go_to_the_device_in_parts(device, monkeypatch):
    """Without ``path`` too."""
    models, images, labels = placed("resnet8", 2, device), images_of(11), torch.arange(11) % 5
    want = ModelArray(models, kernels="own", chunk=4).signals(images, labels, augment="flip")["phi"]
    monkeypatch.setattr(tiled_runner, "IMAGES_AT_ONCE", 4)
    seen, signals = [], TiledRunner.signals

    def spy(self, request, rows, out, done):
        seen.append(rows)
        signals(self, request, rows, out, done)

    monkeypatch.setattr(TiledRunner, "signals", spy)
    result = ModelArray(models, kernels="own", chunk=4).signals(images, labels, augment="flip")["phi"]
    assert seen == [range(0, 4), range(4, 8), range(8, 11)]
    assert torch.equal(result, want)


def test_steps_that_fit(device, monkeypatch):
    array = ModelArray(placed("resnet8", 3, device), kernels="own", chunk=64)
    monkeypatch.setattr(memory, "free_memory", lambda device: 8 << 20)
    with pytest.raises(UserError, match=r"chunk must be at most \d+ for the 8 MiB that are free, got 64"):
        array(images_of(64))
    allowed = ModelArray(placed("resnet8", 3, device), kernels="own")
    allowed(images_of(3))
    program, tile = runner_of(allowed).program, runner_of(allowed).tile
    assert tile.models * tile.images * program.bytes_per_image <= 8 << 20


@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("widest", [1 << 12, 64 << 10, 1 << 20, 100 << 20])
def test_tiles_stay_in_the_cache(count, widest, monkeypatch):
    class Program:
        device, bytes_per_image = torch.device("cpu"), 2 * widest

    Program.widest = widest
    result = autotune.tiles(Program, count, None, 80 << 30)
    resident, alone = result[0], result[-1]
    assert resident.models <= count
    assert resident.models * resident.images * widest <= autotune.CACHE or resident == Tile(1, 1)
    assert alone.models == 1
    assert all(tile.models >= 1 and tile.images >= 1 for tile in result)


def test_logits_that_are_not_finite_are_refused(device):
    models, images, labels = placed("resnet8", 2, device), images_of(5), torch.arange(5) % 5
    with torch.no_grad():
        models[1].head.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"models must give logits without NaN"):
        ModelArray(models, kernels="own", chunk=6).signals(images, labels)
    with pytest.raises(UserError, match="kernels must be 'measured' or 'own', got cudnn"):
        ModelArray(models, kernels="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BATCHED)
def test_captured_and_measured_steps_on_a_gpu(name, dtype, caplog):
    """Captured steps give the bits of uncaptured ones, and measured kernels stay within the figures."""
    models, images, labels = placed(name, 3, "cuda"), images_of(40), torch.arange(40) % 5
    want = phi_of(exact_logits(models_of(name, 3), images), labels)
    own = ModelArray(models, dtype=dtype, kernels="own", chunk=16)
    captured = own.signals(images, labels)["phi"]
    assert runner_of(own).capture, "a step was not captured"
    runner_of(own).set_capture(False)
    assert torch.equal(own.signals(images, labels)["phi"], captured)
    wider = ModelArray(models, dtype=dtype, kernels="own", chunk=40).signals(images, labels)["phi"]
    if name != "normed":
        assert torch.equal(wider, captured)
    measured = ModelArray(models, dtype=dtype).signals(images, labels)["phi"]
    room = 1e-4 if dtype == torch.float32 else 2e-2
    for phi in (captured, measured):
        assert float((phi[0].T.double() - want).abs().max()) <= room


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "dtype"), [("resnet8", torch.float32), ("efficientnet", torch.float16)], ids=str)
def test_triton_kernels_in_the_interpreter(name, dtype, monkeypatch):
    """Whole networks through the Triton kernels: float64's numbers, and the same bits in other chunks and groups."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu",))
    models, images, labels = models_of(name, 2), images_of(3, 8), torch.arange(3) % 5
    want = phi_of(exact_logits(models, images), labels)
    arrays = [
        ModelArray(models, dtype=dtype, kernels="own", chunk=2),
        ModelArray(models[1:], dtype=dtype, kernels="own", chunk=3),
    ]
    monkeypatch.setitem(registry.PREFERENCE, ("model_conv2d", "cpu"), ("triton",))
    registry.choose_again()
    result = [array.signals(images, labels)["phi"] for array in arrays]
    room = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((result[0][0].T.double() - want).abs().max()) <= room
    assert torch.equal(result[1][:, :, 0], result[0][:, :, 1])
