"""What a private step does not take is refused by name, with what to do, before anything is changed."""

import copy

import numpy as np
import pytest
import torch
from private_cases import losses, network
from torch import nn

from kr_fast.privacy import PoissonBatches, make_private
from kr_fast.privacy.layers import Layer
from kr_fast.runtime.errors import UserError
from kr_fast.training import EMA, AdamW


def private_of(model, parameters=None, **options):
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=1.0)
    return make_private(model, optimizer, **{"noise_multiplier": 0.0, "expected_batch_size": 4.0, **options})


def with_parameter(module, name):
    """As the old ``weight_norm`` makes it."""
    module.register_parameter(name, nn.Parameter(torch.ones(1)))
    return module


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
            r"use nn.GroupNorm; .*'resnet14-gn'\), got 1: BatchNorm2d",
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), "got 1: BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 4), Scale()), r"freeze them with requires_grad_\(False\)\), got 1: Scale"),
        (nn.MultiheadAttention(4, 2), "Conv2d, Linear, Embedding, GroupNorm, LayerNorm alone .* MultiheadAttention"),
        (nn.LSTM(4, 4), "got LSTM: LSTM"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pad convolutions with zeros"),
        (nn.Conv2d(4, 4, 2, padding="same"), "pad convolutions alike on all sides"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq, which counts over the batch"),
        (nn.Embedding(4, 4, max_norm=1.0), "have embeddings without max_norm"),
        (
            with_parameter(nn.Conv2d(4, 4, 3), "weight_g"),
            "train weight and bias alone in such a layer .* got Conv2d: Conv2d with weight_g",
        ),
        (Tied(), r"untie them, or call the one module twice\), got two.weight, which is one.weight"),
        (
            nn.DataParallel(nn.Linear(4, 4)),
            r"be the network itself \(step\(\) sums over the processes\), got DataParallel",
        ),
        (nn.Linear(4, 4).double(), "have float32 parameters on one device"),
        (nn.Linear(4, 4).requires_grad_(False), "have at least one parameter that requires a gradient"),
    ],
)
def test_models(model, message):
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=f"make_private: model must {'' if message[:2] == 'be' else '.*'}{message}"):
        private_of(model, list(model.parameters()))
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_optimizers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"optimizer must have all of the model's trained .* got none of 1.weight"):
        private_of(model, model[0].parameters())
    with pytest.raises(UserError, match=r"of the model alone, got 1 others, of which the first is \[3\]"):
        private_of(model, [*model.parameters(), nn.Parameter(torch.ones(3))])
    with pytest.raises(UserError, match="optimizer must be a torch optimizer, got int"):
        make_private(model, 3, noise_multiplier=1.0, expected_batch_size=4.0)


def test_averages():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(UserError, match="ema must be a kr_fast.training.EMA, got AveragedModel"):
        private_of(model, ema=torch.optim.swa_utils.AveragedModel(model))
    with pytest.raises(UserError, match="ema must average parameters of the model alone, got those of another"):
        private_of(model, ema=EMA(other.parameters(), 0.9))
    private_of(model, ema=EMA(model.parameters(), 0.9)).step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, _: model[0].requires_grad_(True), "step: model must train .* got a change of 0.weight"),
        (lambda model, _: model[1].requires_grad_(False), "step: model must train .* got a change of 1.weight"),
        (lambda model, _: model.append(nn.Linear(3, 3)), "step: model must train .* got a change of 2.weight"),
        (
            lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
            "optimizer must have parameters of the model alone",
        ),
    ],
    ids=["unfrozen", "frozen", "added", "another"],
)
def test_what_is_trained_does_not_change(change, message):
    """Gradual unfreezing, say: the optimizer would take gradients that were neither clipped nor noised."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(6, 4)
    model[0].requires_grad_(False)
    private = private_of(model)
    change(model, private.optimizer)
    private.backward(losses(model, x, torch.arange(6) % 3))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        private.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_model_is_made_private_once():
    model = nn.Linear(4, 4)
    private = private_of(model)
    with pytest.raises(UserError, match="model must have"):
        private_of(model)
    private.restore()
    private_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a finite number of at least 0, got -1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be a finite number"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 1e-12, got 0.0"),
        ({"max_grad_norm": 1e-24}, "max_grad_norm must be above 1e-12"),  # squares of such norms are 0: all pass whole
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be a finite number"),
        ({"expected_batch_size": 0}, "expected_batch_size must be above 0"),
        ({"clipping": "none"}, "clipping must be one of flat, automatic, got none"),
        ({"multiplicity": 0}, "multiplicity must be a whole number of at least 1, got 0"),
        ({"seed": 3}, r"seed must be left out: who knows it can subtract the noise"),
        ({"not_private": True}, "not_private must be left out where there is no seed"),
    ],
)
def test_options(options, message):
    with pytest.raises(UserError, match=f"make_private: {message}"):
        private_of(nn.Linear(4, 4), **options)


def test_numbers_of_numpy_are_numbers():
    private = private_of(nn.Linear(4, 4), noise_multiplier=np.float32(1), expected_batch_size=np.int64(5))
    assert repr(private).startswith("PrivateTraining(noise_multiplier=1.0, expected_batch_size=5.0, ")
    assert PoissonBatches(np.int64(20), np.float32(0.5), np.int32(3), 4).state_dict()["records"] == 20


def test_losses():
    model, x, labels = network("images")
    with pytest.raises(UserError, match="with gradients enabled, got a tensor that requires none"):
        private = private_of(model, multiplicity=4)
        private.backward(torch.ones(4))
    with pytest.raises(
        UserError, match=r'losses must be one number a row \(reduction="none"\), got torch.float32 \[\]'
    ):
        private.backward(losses(model, x, labels).mean())
    with pytest.raises(UserError, match="have rows in groups of multiplicity 4 .*, got 6"):
        private.backward(losses(model, x, labels))
    private.restore()
    private = private_of(model)
    with pytest.raises(UserError, match=r"present must be a bool tensor \[6\], got torch.int64 \[6\]"):
        private.backward(losses(model, x, labels), present=labels)
    with pytest.raises(UserError, match=r"layer .* must read one row for each loss \(3\).* got \[6, "):
        private.backward(losses(model, x, labels).view(3, 2).sum(1))
    with pytest.raises(UserError, match="losses must go backward by private.backward"):
        losses(model, x, labels).sum().backward()
    with pytest.raises(UserError, match="those of another"):
        private.backward(nn.Linear(4, 1)(torch.ones(6, 4))[:, 0])
    assert not private.state_dict()["sums"].any()


def test_parameters_read_past_their_layer():
    """Weights tied by hand, or a penalty on them: no norm of a record would have that part of its gradient."""
    model, x, labels = network("tokens")
    private = private_of(model)
    with pytest.raises(UserError, match=r"backward: model must read .* got a gradient of table.weight from elsewhere"):
        private.backward(nn.functional.linear(model.table(x).mean(1), model.table.weight)[:, 0])
    with pytest.raises(UserError, match=r"weight_decay in the place of a penalty on them\), got .* of head.bias"):
        private.backward(losses(model, x, labels) + model.head.bias.norm())
    private.backward(losses(model, x, labels))
    private.restore()
    (losses(model, x, labels) + model.head.bias.norm()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resumes_within_a_logical_batch():
    """The sums so far, the count of steps and the optimizer go on; other options are refused."""
    results = []
    for stop in (False, True):
        model, x, labels = network("images")
        options = {"noise_multiplier": 1.0, "seed": 5, "not_private": True, "clipping": "automatic"}

        def made(model, options=options):
            optimizer = AdamW(model.parameters(), lr=0.01, ema_decay=0.5)
            return make_private(model, optimizer, expected_batch_size=4.0, **options)

        private = made(model)
        private.backward(losses(model, x, labels))
        private.step()
        private.backward(losses(model, x[:3], labels[:3]))
        if stop:
            saved = copy.deepcopy((private.state_dict(), model.state_dict(), private.optimizer.state_dict()))
            averages = copy.deepcopy(private.optimizer.ema.state_dict())
            model = network("images", seed=1)[0]
            model.load_state_dict(saved[1])
            private = made(model)
            private.optimizer.load_state_dict(saved[2])
            private.optimizer.ema.load_state_dict(averages)
            private.load_state_dict(saved[0])
        private.backward(losses(model, x[3:], labels[3:]))
        private.step()
        results.append(torch.cat([p.flatten() for p in (*model.parameters(), *private.optimizer.ema.averages)]))
    assert torch.equal(*results)
    model, _, _ = network("images")
    with pytest.raises(UserError, match="make_private: noise_multiplier must be 1.0, as it was when the state was"):
        private_of(model, noise_multiplier=2.0).load_state_dict(saved[0])


def test_sums_of_another_process_are_refused():
    """Rank 0's state on every rank would count its sums so many times; between logical batches there are none."""
    model, x, labels = network("images")
    private = private_of(model)
    between = {**private.state_dict(), "rank": [1, 2]}
    private.backward(losses(model, x, labels))
    within = {**private.state_dict(), "rank": [1, 2]}
    private.load_state_dict(between)
    with pytest.raises(UserError, match="make_private: state must be of rank 0 of 1, .* got that of rank 1 of 2"):
        private.load_state_dict(within)


def test_a_batch_that_was_added_in_part_is_not_tried_again(monkeypatch):
    """As after a lack of memory: some of its records' gradients would count twice."""
    model, x, labels = network("images")
    private = private_of(model)
    before, add = private.state_dict(), Layer.add

    def fails(layer, *arguments):
        if layer.name == "layers.7":
            raise MemoryError
        add(layer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Layer, "add", fails)
        private.backward(losses(model, x, labels))
    for call in (lambda: private.backward(losses(model, x, labels)), private.step, private.state_dict):
        with pytest.raises(UserError, match="sums must be whole .* got some of a batch whose backward or step ended"):
            call()
    private.load_state_dict(before)
    private.backward(losses(model, x, labels))
    private.step()


def test_a_step_that_ended_in_an_error_is_not_tried_again():
    """Of the optimizer, as for a lack of memory: the sums have noise and are divided already."""
    model, x, labels = network("images")
    private = private_of(model)
    private.backward(losses(model, x, labels))
    before, step = private.state_dict(), private.optimizer.step
    private.optimizer.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        private.step()
    private.optimizer.step = step
    with pytest.raises(UserError, match="step: sums must be whole .* got some of a batch whose backward or step ended"):
        private.step()
    private.load_state_dict(before)
    private.step()
    assert private.steps == 1
