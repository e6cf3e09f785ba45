"""optimize(training=True) of classifiers: a step's gradients beside torch's, what is left unfused, restore."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from small_networks import BasicBlock
from torch import nn

import kr_fast
from kr_fast.models import classifier


def resnet(size=12):
    """Convolutions of 16 inputs and more at 12, 6 and 3 px: those that fill tiles, and those that are torch's."""
    torch.manual_seed(0)
    return classifier("resnet8", num_classes=5, in_channels=1, width=16, image_size=size).train()


def step(model, x, labels):
    """Loss, gradients by name, buffers by name."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {name: b.clone() for name, b in model.named_buffers()}


def compare(model, x=None, labels=None, relative=1e-4):
    """A step of ``model`` patched and not: gradients within ``relative`` of the largest of each, the same buffers."""
    torch.manual_seed(1)
    x = torch.randn(6, 1, 12, 12) if x is None else x
    labels = torch.arange(len(x)) % 5 if labels is None else labels
    exact = step(copy.deepcopy(model).double(), x.double(), labels)
    before = copy.deepcopy(model.state_dict())
    with kr_fast.optimize(model, training=True) as handle:
        got = step(model, x, labels)
    assert torch.allclose(got[0].double(), exact[0], rtol=relative / 10)
    assert got[1].keys() == exact[1].keys()
    for name, grad in exact[1].items():
        error = float((got[1][name].double() - grad).norm() / grad.norm())
        assert error < relative, (name, error)
    for name, buffer in exact[2].items():
        assert torch.allclose(got[2][name].double(), buffer.double(), rtol=relative / 10, atol=1e-6), name
    model.load_state_dict(before)
    return handle


def test_a_step_has_torchs_gradients_and_statistics():
    handle = compare(resnet())
    assert handle.patched["Block"] == 3
    assert handle.patched["Sequential"] == 3


def test_torchvisions_resnets():
    resnets = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    for make, blocks in ((resnets.resnet18, "BasicBlock"), (resnets.resnet50, "Bottleneck")):
        model = make(num_classes=5).train()
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        # A rounding that moves one activation over the corner of a ReLU changes gradients by percents, torch's as well.
        handle = compare(model, torch.randn(8, 3, 16, 16), relative=0.1)
        assert handle.patched[blocks] >= 8
        assert handle.patched["ResNet"] == 1


def torchvisions_blocks(activation):
    """Networks of blocks of torchvision's name and forward, whose ReLU was replaced."""
    kind = type("BasicBlock", (BasicBlock,), {"__module__": "torchvision.models.resnet"})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), kind(16, 16), kind(16, 32, 2), nn.AvgPool2d(6), nn.Flatten())
    model[1].relu = model[2].relu = activation
    return nn.Sequential(model, nn.Linear(32, 5)).train()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(0.2)], ids=repr)
def test_the_activation_of_a_block_is_the_modules(activation):
    handle = compare(torchvisions_blocks(activation))
    assert handle.patched["BasicBlock"] == 2


def test_running_statistics_of_all_batches_are_torchs():
    """torch's update_bn takes away the momentum of every norm while it averages."""
    model, batches = resnet(), torch.randn(3, 4, 1, 12, 12)
    torch.optim.swa_utils.update_bn(batches, expected := copy.deepcopy(model))
    with kr_fast.optimize(model, training=True):
        torch.optim.swa_utils.update_bn(batches, model)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_one_image_is_torchs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)), torch.randn(1, 16, 16)
    expected = model(x)
    with kr_fast.optimize(model, training=True):
        torch.testing.assert_close(model(x), expected)


def test_restore_gives_bits_and_layouts_back():
    model, x, labels = resnet(), torch.randn(4, 1, 12, 12), torch.arange(4)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    first, buffers = step(model, x, labels), copy.deepcopy(model.state_dict())
    handle = kr_fast.optimize(model, training=True)
    step(model, x, labels)
    handle.restore()
    handle.restore()
    model.load_state_dict({name: torch.zeros_like(v) if "running" in name else v for name, v in buffers.items()})
    for name, value in model.named_buffers():
        value.fill_(1 if "var" in name else 0)
    again = step(model, x, labels)
    assert all(torch.equal(again[1][name], grad) for name, grad in first[1].items())
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_trains_by_itself_and_state_dicts_are_as_before():
    model = resnet()
    names = list(model.state_dict())
    with kr_fast.optimize(model, training=True):
        other = copy.deepcopy(model)
        assert list(other.state_dict()) == names
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        x = torch.randn(4, 1, 12, 12)
        assert float(other(x).detach().abs().max()) == 0
        assert float(model(x).detach().abs().max()) > 0


def test_a_step_has_the_same_bits_for_one_thread_and_two():
    model, x, labels = resnet(), torch.randn(16, 1, 12, 12), torch.arange(16) % 5
    steps, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trained = copy.deepcopy(model)
            kr_fast.optimize(trained, training=True)
            steps.append(step(trained, x, labels))
    finally:
        torch.set_num_threads(before)
    assert steps[0][1].keys() == dict(model.named_parameters()).keys()
    for name, grad in steps[0][1].items():
        assert torch.equal(grad, steps[1][1][name]), name


def test_hooks_run_whenever_they_were_added():
    model, calls = resnet(), []
    block = model.stages[0]
    block.bn1.register_forward_hook(lambda *_: calls.append("before"))
    with kr_fast.optimize(model, training=True):
        block.bn2.register_forward_pre_hook(lambda *_: calls.append("after"))
        block.conv1.register_forward_hook(lambda *_: calls.append("conv"))
        compared = step(model, torch.randn(4, 1, 12, 12), torch.arange(4))
    assert sorted(calls) == ["after", "before", "conv"]
    assert torch.isfinite(compared[0])


@pytest.mark.parametrize("change", ["frozen norm", "frozen weights", "shared norm", "eval", "other norm", "other conv"])
def test_other_modes_compute_the_same(change):
    model = resnet()
    if change == "frozen norm":  # running statistics, which stay as they are
        model.stages[1].bn1.eval()
    elif change == "frozen weights":
        for parameter in model.stages[0].parameters():
            parameter.requires_grad_(False)
    elif change == "shared norm":
        model.stages[0].bn2 = model.stages[0].bn1
    elif change == "other norm":  # of no weights
        model.stages[1].bn2 = nn.BatchNorm2d(32, affine=False)
    elif change == "other conv":
        model.stages[2].conv1 = nn.Conv2d(32, 64, 3, 2, 1, padding_mode="reflect", bias=False)
    else:
        model.eval()
    compare(model)


@pytest.mark.parametrize("size", [12, 28])
def test_logits_by_running_statistics_are_torchs(size):
    model, x = resnet(size), torch.randn(5, 1, size, size)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        model.eval()
        expected, before = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model.state_dict())
        with kr_fast.optimize(model, training=True):
            got = model(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_replaced_later_is_used():
    model, x = resnet(), torch.randn(4, 1, 12, 12)
    with kr_fast.optimize(model, training=True), torch.no_grad():
        model.stages[1].bn2 = nn.BatchNorm2d(32, eps=0.5)
        got = model(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_one_value_a_channel_is_an_error():
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    with kr_fast.optimize(model, training=True), pytest.raises(ValueError, match="at least 2 numbers of each channel"):
        model(torch.randn(1, 1, 1, 1))


def test_no_image_is_no_gradient():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1))
    with kr_fast.optimize(model, training=True):
        model(torch.randn(0, 16, 8, 8)).sum().backward()
    assert float(model[0].weight.grad.abs().max()) == 0


def mixed_errors(model, x, dtype):
    """Relative error of each gradient of a step under autocast, patched and not, against float64; logits' dtypes."""
    labels = torch.arange(len(x)) % 5
    exact = step(copy.deepcopy(model).double(), x.double(), labels)
    errors, dtypes = [], []
    for patch in (True, False):
        each = copy.deepcopy(model)
        if patch:
            kr_fast.optimize(each, training=True)
        with torch.autocast("cpu", dtype):
            dtypes.append(each(x).dtype)
        each.load_state_dict(model.state_dict())
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(each(x), labels)
        loss.backward()
        pairs = [(p.grad.double(), exact[1][name]) for name, p in each.named_parameters()]
        assert all(p.grad.dtype == torch.float32 for p in each.parameters())
        errors.append([float((got - want).norm() / want.norm()) for got, want in pairs])
        for name, buffer in each.named_buffers():
            assert torch.allclose(buffer.double(), exact[2][name].double(), rtol=0.03, atol=0.03), name
    return *errors, dtypes


@pytest.mark.parametrize("change", [None, "hook", "float32 residual", "float16"])
def test_a_step_in_mixed_precision_errs_as_torchs(change):
    """Under autocast, fused or not: each gradient is at most twice as far from float64 as torch's, plus 0.01."""
    model = resnet()
    if change == "hook":
        model.stages[1].bn2.register_forward_hook(lambda *_: None)
    elif change == "float32 residual":  # a sum of two dtypes, which is float32
        model.stages[0].shortcut = nn.BatchNorm2d(16)
        model.stages[0].shortcut.register_forward_hook(lambda module, args, y: y.float())
    torch.manual_seed(1)
    dtype = torch.float16 if change == "float16" else torch.bfloat16
    ours, torchs, dtypes = mixed_errors(model, torch.randn(32, 1, 12, 12), dtype)
    assert dtypes[0] == dtypes[1]
    assert max(a / (2 * b + 0.01) for a, b in zip(ours, torchs, strict=True)) < 1, (ours, torchs)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), resnet().double()], ids=["linear", "float64"])
def test_what_is_not_taken_stays_as_it_is_and_is_told(model, caplog):
    model = nn.Sequential(model)  # of a name that no other test has told of
    model.__class__ = type(f"Told{type(model[0]).__name__}", (nn.Sequential,), {})
    with caplog.at_level(logging.INFO, "kr_fast"):
        for _ in range(2):
            handle = kr_fast.optimize(model, training=True)
    assert handle.patched == {}
    assert len(caplog.records) == 1
    assert "trains as it is" in caplog.text


def test_a_model_is_a_module():
    with pytest.raises(ValueError, match="^optimize: model must be a torch module, got int$"):
        kr_fast.optimize(3, training=True)
