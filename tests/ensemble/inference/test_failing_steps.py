"""Steps of the GPU's program of ModelArray that fail: logits that are not finite, captures, kernels."""

import functools
import logging

import pytest
import torch
from small_networks import exact_logits, images_of, models_of
from torch import nn

from kr_fast.ensemble import ModelArray
from kr_fast.ensemble.inference import autotune, build
from kr_fast.ensemble.inference.autotune import Tile
from kr_fast.ensemble.inference.tiled_runner import TiledRunner
from kr_fast.runtime import cuda_graph
from kr_fast.runtime.errors import UserError


def only_runner(array):
    (runner,) = array.runners.values()
    return runner


@pytest.mark.parametrize("broken", [0, 1])
def test_a_capture_does_not_forget_what_was_not_finite(broken, monkeypatch):
    """Every group's step is captured, by two warm-ups, before images of any are judged."""
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu",))
    monkeypatch.setattr(build, "tiles", lambda *_: [Tile(1, 8)])
    models, images, labels = models_of("resnet8", 2), images_of(5), torch.arange(5) % 5
    with torch.no_grad():
        models[broken].head.weight.fill_(3e38)
    array = ModelArray(models, kernels="own")
    array(images)

    class Captured:
        def __init__(self, run, pool):
            run()
            run()
            self.replay = run

    monkeypatch.setattr(cuda_graph, "capture", Captured)
    only_runner(array).set_capture(True)
    with pytest.raises(UserError, match="models must give logits without NaN"):
        array.signals(images, labels)


@pytest.mark.parametrize("kind", ["not captured", "broken", "does not fit"])
def test_steps_that_cannot_be_captured_or_run(kind, monkeypatch, caplog):
    """The first are timed by their launches, and of the second the log says why models run one after the other."""
    monkeypatch.setattr(build, "BATCHED_DEVICES", ("cpu",))
    monkeypatch.setattr(build, "tiles", lambda *_: [Tile(2, 4)])
    monkeypatch.setattr(autotune, "REPEATS", 1)
    models, images = models_of("resnet8", 2), images_of(5)

    def capture(run, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: 1.0  # noqa: E731

    def clock(run, device):
        if kind == "broken":
            raise RuntimeError("no such kernel\nand a trace")
        if kind == "does not fit":
            errors = pytest.importorskip("triton.runtime.errors")
            raise errors.OutOfResources(98_304, 65_536, "shared memory")
        return autotune.seconds(run, torch.device("cuda"))

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(build, "choose", functools.partial(autotune.choose, timer=clock))
    array = ModelArray(models)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        got = array(images)
    assert torch.allclose(got.double(), exact_logits(models, images), atol=1e-4)
    assert isinstance(only_runner(array), TiledRunner) == (kind == "not captured")
    assert ("one after the other: a step of 2 models" in caplog.text) == (kind != "not captured")


class Masked(nn.Module):
    """A mask, whose number of channels the host must wait for: that cannot be captured."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)
        self.register_buffer("mask", torch.arange(8) % 2 == 0)

    def forward(self, x):
        return self.head(self.conv(x).amax((2, 3))[:, self.mask])


@pytest.mark.gpu
def test_a_mask_on_a_gpu(caplog):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(Masked().eval())
    images, stream = images_of(10), torch.cuda.current_stream()
    want = exact_logits(models, images)
    array = ModelArray([model.cuda() for model in models])
    with caplog.at_level(logging.WARNING, "kr_fast"):
        got = array(images).cpu().double()
    assert float((got - want).abs().max()) <= 1e-4
    assert "cannot be captured" in caplog.text
    assert torch.cuda.current_stream() == stream
