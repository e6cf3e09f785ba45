"""SGD and AdamW in one pass: as torch's own with clipping and diffusers' EMAModel, in and out of a saved state."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from kr_fast.backends import registry
from kr_fast.training import EMA, SGD, AdamW, PowerEMA

LAST = torch.channels_last
DECAY = 0.9


def network():
    """Filters of 3x3 and 1x1 in channels_last, a norm, biases."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 5, 3)
    return nn.Sequential(*layers).to(memory_format=LAST)


def groups(model):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": decayed, "weight_decay": 1e-3}, {"params": [p for p in model.parameters() if p.ndim <= 1]}]


OURS = {
    "sgd": lambda model, **more: SGD(groups(model), 0.05, 0.9, nesterov=True, **more),
    "adamw": lambda model, **more: AdamW(groups(model), 1e-2, weight_decay=0.0, **more),
}
TORCHS = {
    "sgd": lambda model: torch.optim.SGD(groups(model), 0.05, 0.9, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(groups(model), 1e-2, weight_decay=0.0),
}
KINDS = pytest.mark.parametrize("kind", OURS)
CLIP = {"max_grad_norm": 0.5, "ema_decay": DECAY}


def gradients(model, step):
    """Those of the step, the same for each model and dtype."""
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=draw, dtype=torch.float64) * (0.01 if step % 2 else 1e-4)
        p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)


def train(model, optimizer, steps, by_torch=False):
    for step in steps:
        gradients(model, step)
        if by_torch:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


def difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).norm() / q.detach().norm()) for p, q in pairs)


def same(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


@KINDS
def test_fifty_steps_are_those_of_torch(kind):
    """With a schedule that moves the rate, and for SGD the momentum; the error is that of torch's own to float64."""
    model, other, exact = network(), network(), network().double()
    optimizers = OURS[kind](model, **CLIP), TORCHS[kind](other), TORCHS[kind](exact)
    rates = [torch.optim.lr_scheduler.OneCycleLR(each, 0.05, total_steps=50) for each in optimizers]
    for step in range(50):
        for i, (each, optimizer) in enumerate(zip((model, other, exact), optimizers, strict=True)):
            train(each, optimizer, [step], by_torch=i > 0)
            rates[i].step()
    assert difference(model, other) < 1e-6
    assert difference(model.double(), exact) < 1e-6
    count = sum(p.numel() for p in model.parameters())
    assert optimizers[0].grad_norm == pytest.approx(0.01 * math.sqrt(count), rel=0.1)


@KINDS
def test_a_group_may_be_empty(kind):
    """As that of weights to decay, where a network's biases and norms alone are trained."""
    model, other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    assert groups(model)[0]["params"] == []
    train(model, OURS[kind](model, **CLIP), range(3))
    train(other, TORCHS[kind](other), range(3), by_torch=True)
    assert difference(model, other) < 1e-6


@KINDS
def test_a_saved_state_is_torchs_own(kind):
    """A run goes on from a state that torch's class has saved, and the other way round; contiguous or channels_last."""
    expected = network()
    model = network().to(memory_format=torch.contiguous_format)
    optimizer = OURS[kind](expected, max_grad_norm=0.5)
    train(expected, optimizer, range(9))
    last = None
    for part, by_torch in enumerate((True, False, True)):
        now = TORCHS[kind](model) if by_torch else OURS[kind](model, max_grad_norm=0.5)
        if last is not None:
            now.load_state_dict(copy.deepcopy(last.state_dict()))
        train(model, now, range(3 * part, 3 * part + 3), by_torch)
        last = now
    assert difference(model, expected) < 1e-6
    assert last.state_dict().keys() == optimizer.state_dict().keys()
    assert last.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


@KINDS
@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_copies_go_on_to_the_same_bits(kind, way):
    model = network()
    optimizer = OURS[kind](model, **CLIP)
    train(model, optimizer, range(3))
    pair = model, optimizer
    other, its = copy.deepcopy(pair) if way == "copied" else pickle.loads(pickle.dumps(pair))
    assert its.grad_norm == optimizer.grad_norm
    assert same(train(model, optimizer, range(3, 6)), train(other, its, range(3, 6)))
    assert all(map(torch.equal, optimizer.ema.averages, its.ema.averages))
    assert its.ema.optimization_step == 6


def test_average_is_that_of_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    model, other = network(), network()
    optimizer, plain = AdamW(model.parameters(), 1e-2, **CLIP), torch.optim.AdamW(other.parameters(), 1e-2)
    ema = training_utils.EMAModel(other.parameters(), decay=DECAY)
    for step in range(20):
        train(model, optimizer, [step])
        train(other, plain, [step], by_torch=True)
        ema.step(other.parameters())
    close = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(optimizer.ema.averages, [each.detach() for each in ema.shadow_params], **close)
    assert optimizer.ema.next_decay() == ema.get_decay(21)
    # Each reads the other's state, and they go on together.
    ours, theirs = optimizer.ema.state_dict(), copy.deepcopy(ema.state_dict())
    assert ours.keys() == theirs.keys()
    assert {**ours, "shadow_params": 0} == {**theirs, "shadow_params": 0}
    ema.load_state_dict(ours)
    optimizer.ema.load_state_dict(theirs)
    train(model, optimizer, [20])
    train(other, plain, [20], by_torch=True)
    ema.step(other.parameters())
    torch.testing.assert_close(optimizer.ema.averages, [each.detach() for each in ema.shadow_params], **close)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.ema.applied():
        assert all(map(torch.equal, model.parameters(), optimizer.ema.averages))
    assert all(map(torch.equal, model.parameters(), before))


def test_power_average_weighs_steps_by_a_power_of_their_number():
    """In closed form and float64; saved and loaded on the way."""
    model, power, count = network(), 6.94, 200
    optimizer = AdamW(model.parameters(), 1e-2)
    optimizer.ema = PowerEMA(list(model.parameters()), power)
    values = []
    for step in range(count):
        train(model, optimizer, [step])
        values.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
        if step == 20:
            loaded = PowerEMA(list(model.parameters()), power)
            loaded.load_state_dict(copy.deepcopy(optimizer.ema.state_dict()))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.ema = loaded
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    weights = (steps ** (power + 1) - (steps - 1) ** (power + 1)) / count ** (power + 1)
    expected = (weights[:, None] * torch.stack(values)).sum(0)
    average = torch.cat([each.double().flatten() for each in optimizer.ema.averages])
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert float(weights.sum()) == pytest.approx(1)
    mean = float((weights * steps).sum())
    assert float((weights * (steps - mean) ** 2).sum().sqrt()) / count == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_ema_warmup": True}, "use_ema_warmup must be False, got True"),
        ({"shadow_params": [torch.zeros(2)]}, "shadow_params must have the shapes of the 1 parameters, got 1 tensors"),
    ],
)
def test_another_average_is_refused(changes, message):
    ema = EMA([torch.zeros(3)], DECAY)
    with pytest.raises(ValueError, match=f"EMA: {message}"):
        ema.load_state_dict({**ema.state_dict(), **changes})


@KINDS
def test_where_there_is_no_kernel_torch_steps(kind, caplog):
    """In float64: the same values, said once; the average, and nothing where the norm is not finite, as well."""
    model, other = network().double(), network()
    optimizer, its = OURS[kind](model, **CLIP), OURS[kind](other, **CLIP)
    with caplog.at_level(logging.INFO, logger="kr_fast"):
        train(model, optimizer, range(6))
    assert [record.message for record in caplog.records] == [
        f"{type(optimizer).__name__} takes torch's own step: dtype must be one of float32, got float64"
    ]
    train(other, its, range(6))
    assert difference(other.double(), model) < 1e-6
    for ours, expected in zip(its.ema.averages, optimizer.ema.averages, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(model)
    next(model.parameters()).grad.fill_(math.nan)
    optimizer.step()
    assert math.isnan(optimizer.grad_norm)
    assert same(model, before)


@KINDS
def test_a_module_may_move(kind):
    """To another layout and to float64 and back between steps: values are those of one that stayed."""
    model, other = network(), network()
    optimizer, its = OURS[kind](model, **CLIP), OURS[kind](other, **CLIP)
    for step in range(4):
        train(model, optimizer, [step])
        train(other, its, [step])
        if step == 1:
            model.to(memory_format=torch.contiguous_format)
        if step == 2:
            model.double().float()
    assert difference(model, other) < 1e-6
    for ours, expected in zip(optimizer.ema.averages, its.ema.averages, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_momentum_may_be_0_at_times():
    """torch then leaves the buffer as it is."""
    model, other = network(), network()
    optimizers = SGD(model.parameters(), 0.05), torch.optim.SGD(other.parameters(), 0.05)
    for momentum in (0.0, 0.9, 0.0, 0.8):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.param_groups[0]["momentum"] = momentum
            train(each, optimizer, [int(10 * momentum)])
    assert difference(model, other) < 1e-6


@KINDS
def test_shared_frozen_and_unused_parameters(kind):
    """A shared one moves once; a frozen and an unused one stay, as with torch."""

    def build():
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        model[1].weight = model[0].weight
        model[2].requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(3))
        return model

    model, other = build(), build()
    optimizer, its = OURS[kind](model), TORCHS[kind](other)
    x = torch.randn(5, 4)
    for _ in range(4):
        for each, steps in ((model, optimizer), (other, its)):
            steps.zero_grad()
            each(x).square().sum().backward()
            steps.step()
    assert difference(model, other) < 1e-6
    assert torch.equal(model.unused, torch.ones(3))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hooks_and_closures(kind, dtype):
    """Hooks run once a step, also where torch's own step is taken; a closure's loss comes back."""
    TORCHS[kind](network())  # torch wraps the step of its class when the first one is made
    model, calls = network().to(dtype), []
    optimizer = OURS[kind](model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        gradients(model, 0)
        return torch.is_grad_enabled()

    assert optimizer.step(closure) is True
    assert calls == ["before", "after"]


def test_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, other = network(), network()
    optimizer, its = AdamW(model.parameters(), 1e-2, **CLIP), AdamW(other.parameters(), 1e-2, **CLIP)
    accelerator, x = accelerate.Accelerator(cpu=True), torch.randn(4, 1, 8, 8)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    for _ in range(3):
        for each, steps in ((wrapped, prepared), (other, its)):
            steps.zero_grad()
            accelerator.backward(each(x).square().sum())
            steps.step()
    assert same(accelerator.unwrap_model(wrapped), other)
    assert optimizer.grad_norm == its.grad_norm > 0
    assert optimizer.ema.optimization_step == 3


def test_the_kernel_runs():
    """Not torch's step, on a CPU in float32."""
    model = network()
    optimizer = SGD(model.parameters(), 0.1, 0.9)
    gradients(model, 0)
    with registry.added("optimizer_step", "cpu", lambda call: 12.0):
        optimizer.step()
    assert optimizer.grad_norm == 12.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD([], 0.1), "SGD: params must hold at least one parameter, got \\[\\]"),
        (lambda p: AdamW([p], max_grad_norm=0), "AdamW: max_grad_norm must be above 0, got 0"),
        (lambda p: PowerEMA([p], -1), "PowerEMA: power must be at least 0, got -1"),
        (lambda p: AdamW([p], ema_decay=1.5), r"EMA: decay must be in \[0, 1\], got 1.5"),
        (
            lambda p: AdamW([p], ema_decay=0.9).add_param_group({"params": [p]}),
            "AdamW: param_group must be given before there is a moving average",
        ),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(3, requires_grad=True))
