"""Training shadow models: one after the other, eager and with torch.compile, against many at once.

Everyone takes the first STEPS steps of every model on the same random draws,
from uint8 images that are on the device. On a GPU: 64 ResNet-20 on halves of 50,000 images, batches of 64, products in
bfloat16 for all (autocast for the loops), with rows in exact float32 (no TF32). On a CPU a toy case in float32, where
training at once is not what is meant to be used. A step costs the same at any time of training, so that an epoch takes
steps an epoch times this.
"""

import functools

import pytest
import torch
from torch import nn

from kr_fast.data import Augment, augmented
from kr_fast.ensemble import TrainConfig
from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.ensemble.training import trainer
from kr_fast.ensemble.training.recipe import Steps, epoch_draws, make_optimizer
from kr_fast.ensemble.training.workers import Job
from kr_fast.models import classifier
from kr_fast.runtime import seeds

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODELS, STEPS = (64, 10) if GPU else (4, 4)
THREADS = 2
CASES = [
    (provider, dtype) for dtype in ("bfloat16", "float32")[not GPU :] for provider in ("eager", "compile", "batched")
]


def make_job():
    count, side, width, batch, name = (50_000, 32, 16, 64, "resnet20") if GPU else (512, 16, 8, 32, "resnet8")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    make = functools.partial(classifier, name, num_classes=10, in_channels=3, width=width)
    config = TrainConfig(epochs=16, batch_size=batch, augment=Augment(shift=2, flip=True))
    return Job(make, images, labels, keep_matrix(MODELS, count, 0), config, 0, None)


def one_after_the_other(job, dtype, compiled):
    """Returns ``run() -> [weights of every model]``. The network is compiled once, for all models."""
    images, labels = job.images.to(DEVICE), job.labels.to(DEVICE)
    model = job.fresh(0).to(DEVICE).to(memory_format=torch.channels_last).train()
    forward = torch.compile(model, mode="reduce-overhead" if GPU else "default") if compiled else model
    fresh = [job.fresh(index).state_dict() for index in range(MODELS)]

    def train(index):
        model.load_state_dict(fresh[index])
        kept = job.keep[index].nonzero()[:, 0]
        steps = Steps.of(job.config, len(kept))
        optimizer, schedule = make_optimizer(model, job.config, job.config.epochs * steps.per_epoch)
        seed = seeds.derive(job.seed, "shadow", index)
        order, draws, _ = epoch_draws(job.config, len(kept), images.shape[1:3], seed, 0)
        order, draws = kept[order].to(DEVICE), draws.to(DEVICE)
        for step in range(STEPS):
            rows = slice(step * steps.batch, (step + 1) * steps.batch)
            x = augmented(images, order[rows], draws[rows])
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = forward(x)
            nn.functional.cross_entropy(logits.float(), labels[order[rows]]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def run():
        result = [train(index) for index in range(MODELS)]
        if GPU:
            torch.cuda.synchronize()
        return result

    return run


def at_once(job, dtype):
    setup = trainer.Setup(trainer.graph_of(job), getattr(torch, dtype), DEVICE)
    group = trainer.GroupTrainer(job, range(MODELS), setup)
    fresh, drawn = group.state.weight.clone(), group.draw(0)
    group.begin(drawn)
    step = group.captured() if GPU else group.step

    def run():
        group.state.weight.copy_(fresh)
        group.state.velocity.zero_()
        group.begin(group.draw(0))  # nothing else hides it here
        for _ in range(STEPS):
            step()
        if GPU:
            torch.cuda.synchronize()
        models = [group.model(m) for m in (0, MODELS - 1)]
        return [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]

    return run


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job():
    return make_job()


@functools.cache
def expected(dtype):
    """What an eager loop makes of the first and the last model."""
    result = one_after_the_other(make_job(), dtype, False)()
    return result[0], result[-1]


@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
def test_train(benchmark, job, provider, dtype):
    benchmark.group = f"{MODELS} models, {STEPS} steps, {dtype}, {'GPU' if GPU else f'{THREADS} threads'}"
    run = at_once(job, dtype) if provider == "batched" else one_after_the_other(job, dtype, provider == "compile")
    result = run()
    start = [torch.cat([p.detach().flatten() for p in job.fresh(m).parameters()]) for m in (0, MODELS - 1)]
    # Of the way that the weights have gone: a ReLU that a rounding sends to the other side of its bend shows here.
    room = 0.3 if dtype == "bfloat16" else 0.1
    for a, b, before in zip((result[0], result[-1]), expected(dtype), start, strict=True):
        assert float((a - b).norm()) < room * float((b.cpu() - before).norm())
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    if benchmark.stats:  # not under --benchmark-disable
        rate = MODELS * STEPS / benchmark.stats.stats.median
        benchmark.extra_info |= {"model_steps_per_second": rate, "images_per_second": rate * job.config.batch_size}
