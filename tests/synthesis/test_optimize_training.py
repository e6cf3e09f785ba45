"""optimize(training=True) of diffusers' networks: a step's gradients beside torch's, refusals, restore."""

import copy

import pytest
import torch
from torch.nn.functional import mse_loss

import kr_fast
from kr_fast.models import unet
from kr_fast.runtime.errors import UserError

diffusers = pytest.importorskip("diffusers")


def network():
    """Attention at 8 px of 2 heads, skip connections over uneven groups, an up-sampler and a strided convolution."""
    torch.manual_seed(0)
    model = unet(16, 16, 1, 4, widths=(16, 32)).train()
    for parameter in model.parameters():  # diffusers' zeros and ones would hide a missing weight or bias
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def dit(**change):
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2}
    options |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5, "norm_num_groups": 1, **change}
    model = diffusers.DiTTransformer2DModel(**options).train()
    for block in model.transformer_blocks:  # which drops labels at random
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def step(model, x, time, labels, target):
    model.zero_grad()
    loss = mse_loss(model(x, time, class_labels=labels).sample, target)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batch(size=16, count=6):
    draw = torch.Generator().manual_seed(1)
    x, target = (torch.randn(count, 1, size, size, generator=draw) for _ in range(2))
    return x, torch.rand(count, generator=draw) * 1000, torch.arange(count) % 4, target


@pytest.mark.parametrize(("make", "size"), [(network, 16), (dit, 8)])
def test_a_step_has_torchs_gradients(make, size):
    model, arguments = make(), batch(size)
    double = [v.double() if v.is_floating_point() else v for v in arguments]
    want = step(copy.deepcopy(model).double(), *double)
    theirs = step(model, *arguments)
    with kr_fast.optimize(model, training=True) as handle:
        got = step(model, *arguments)
    assert handle.patched["Attention"] >= 2
    assert torch.allclose(got[0].double(), want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        scale = want[1][name.replace("to_k", "to_q")].norm()  # a softmax does not change with the bias of its keys
        error = float((got[1][name].double() - grad).norm() / scale)
        assert error < 1e-4, (name, error)
    again = step(model, *arguments)
    assert all(torch.equal(again[1][name], grad) for name, grad in theirs[1].items())


@pytest.mark.parametrize(("make", "size"), [(network, 16), (dit, 8)])
def test_a_step_has_the_same_bits_for_one_thread_and_two(make, size):
    """Of 64 images: the library shares the sums of a smaller batch's weight gradients out in the same way."""
    steps, before, arguments = [], torch.get_num_threads(), batch(size, 64)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = make()
            kr_fast.optimize(model, training=True)
            steps.append(step(model, *arguments))
    finally:
        torch.set_num_threads(before)
    (loss, one), (other, two) = steps
    assert torch.equal(loss, other)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_checkpoints_hooks_and_dropout_stay_as_they_are():
    checkpointed, hooked, dropping = network(), network(), network()
    checkpointed.enable_gradient_checkpointing()
    hooked.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: None)
    dropping.mid_block.attentions[0].to_out[1].p = 0.1
    for model in (checkpointed, hooked, dropping):
        assert kr_fast.optimize(model, training=True).patched == {}


def test_a_step_in_mixed_precision_errs_as_torchs():
    """Under bfloat16 autocast: each gradient is at most twice as far from float64 as torch's, plus 0.01."""
    model, arguments = network(), batch(count=32)
    double = [v.double() if v.is_floating_point() else v for v in arguments]
    exact = step(copy.deepcopy(model).double(), *double)[1]
    errors = []
    for patch in (True, False):
        each = copy.deepcopy(model)
        if patch:
            kr_fast.optimize(each, training=True)
        with torch.autocast("cpu", torch.bfloat16):
            grads = step(each, *arguments)[1]
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        errors.append([float((grads[name] - want).norm() / want.norm()) for name, want in exact.items()])
    assert max(ours / (2 * torchs + 0.01) for ours, torchs in zip(*errors, strict=True)) < 1, errors


def test_autocast_to_another_dtype_is_refused():
    model, (x, time, labels, _) = network(), batch()
    kr_fast.optimize(model, training=True)
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match="bfloat16, .* got autocast to float16"):
        model(x, time, class_labels=labels)
