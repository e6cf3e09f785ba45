"""Shadow models trained at once on the Triton kernels: in Triton's interpreter, and on a GPU."""

import functools
import os

import pytest
import torch
from torch import nn

from kr_fast.backends import registry
from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, train_shadows
from kr_fast.ensemble.training import trainer
from kr_fast.ensemble.training.workers import Job
from kr_fast.models import classifier

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
resnet = functools.partial(classifier, "resnet8", num_classes=3, in_channels=1, width=4)


def data(count, side=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, side, side, 1), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (count,), generator=generator)


def states(result):
    return [model.state_dict() for model in result.array.models]


def same(first, second):
    return all(all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True))


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
def test_triton_kernels_train_the_same_models():
    config = TrainConfig(epochs=1, batch_size=5, learning_rate=0.05)

    def make():
        layers = [nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 3))

    want = train_shadows(make, *data(20), num_models=2, seed=9, config=config, batched=True)
    with registry.forced("triton"):
        got = train_shadows(make, *data(20), num_models=2, seed=9, config=config, batched=True)
        apart = train_shadows(make, *data(20), num_models=2, seed=9, config=config, batched=1)
    assert same(states(got), states(apart))
    for a, b in zip(states(got), states(want), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
class TestOnAGpu:
    config = TrainConfig(epochs=3, batch_size=16, learning_rate=0.05, augment=Augment(shift=1, flip=True))

    def job(self, models=4):
        keep = torch.rand(models, 80, generator=torch.Generator().manual_seed(0)).argsort(1) < 40
        return Job(resnet, *data(80, 16), keep, self.config, 9, None)

    def trained(self, job, indices, dtype, captured=True):
        group = trainer.GroupTrainer(job, indices, trainer.Setup(trainer.graph_of(job), dtype, torch.device("cuda")))
        group.run = None if captured else group.step
        for epoch in range(self.config.epochs):
            group.begin(group.draw(epoch))
            group.epoch(epoch)
        return [group.model(m).state_dict() for m in range(len(indices))]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_captured_step_is_the_step_and_company_changes_nothing(self, dtype):
        job = self.job()
        whole = self.trained(job, [0, 1, 2, 3], dtype)
        assert same(self.trained(job, [0, 1, 2, 3], dtype, captured=False), whole)
        assert same(self.trained(job, [2], dtype), whole[2:3])

    def test_float32_is_the_reference(self):
        job = self.job(2)
        with registry.forced("reference"):
            want = self.trained(job, [0, 1], torch.float32, captured=False)
        for a, b in zip(self.trained(job, [0, 1], torch.float32), want, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)
