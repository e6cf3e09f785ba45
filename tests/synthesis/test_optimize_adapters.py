"""optimize on networks with adapters, as peft puts them in the place of layers, or hooks: computed, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import kr_fast
from kr_fast.runtime.errors import UserError

diffusers = pytest.importorskip("diffusers")


class Adapter(nn.Module):
    """A layer with something learnt beside it, which its ``weight`` does not hold; as the layers of peft."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, nn.Parameter(0.5 * torch.randn_like(base.weight))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        if isinstance(self.base, nn.Linear):
            return self.base(x) + functional.linear(x, self.delta)
        return self.base(x) + functional.conv2d(x, self.delta, None, self.base.stride, self.base.padding)


def adapted(model, name):
    """With an adapter for every layer of this name."""
    for module in list(model.modules()):
        if isinstance(getattr(module, name, None), (nn.Linear, nn.Conv2d)):
            setattr(module, name, Adapter(getattr(module, name)))
    return model.eval()


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def dit():
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 1, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(**options, num_embeds_ada_norm=5)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv_shortcut", "to_q"])
def test_adapters_are_computed(name):
    model, x, labels = adapted(unet(), name), torch.randn(7, 1, 8, 8), torch.arange(7) % 5
    with torch.inference_mode():
        want = model(x, 37, class_labels=labels).sample
        with kr_fast.optimize(model):
            torch.testing.assert_close(model(x, 37, class_labels=labels).sample, want, rtol=1e-4, atol=1e-4)
        for module in model.modules():
            if isinstance(module, Adapter):
                module.delta.zero_()
        assert (model(x, 37, class_labels=labels).sample - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "name", "text"),
    [
        (unet, "time_emb_proj", "have plain linear projections of its time embedding, got Adapter"),
        (dit, "to_q", "have blocks of .*, got Adapter in the place of a linear layer"),
        (dit, "linear", "have blocks of .*, got Adapter in the place of a linear layer"),
        (dit, "proj_out_1", "have blocks of .*, got Adapter in the place of a linear layer"),
    ],
)
def test_adapters_of_weights_that_are_joined_are_refused(make, name, text):
    model = adapted(make(), name)
    with pytest.raises(UserError, match=f"optimize: model must {text}"):
        kr_fast.optimize(model)
    with kr_fast.optimize(model.train(), training=True) as handle:
        assert not handle.patched


HOOKED = [
    (unet, "down_blocks.0.resnets.0.norm1", "norm1 of ResnetBlock2D"),
    (unet, "up_blocks.0.resnets.0.conv_shortcut", "conv_shortcut of ResnetBlock2D"),
    (unet, "mid_block.resnets.0.time_emb_proj", "time_emb_proj of ResnetBlock2D"),
    (unet, "mid_block.attentions.0.to_q", "to_q of Attention"),
    (unet, "conv_norm_out", "conv_norm_out of UNet2DModel"),
    (unet, "class_embedding", "class_embedding of UNet2DModel"),
    (dit, "transformer_blocks.0", "transformer_blocks.0 of DiTTransformer2DModel"),
    (dit, "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn1.to_k of DiTTransformer2DModel"),
]


@pytest.mark.parametrize(("make", "name", "text"), HOOKED)
def test_hooks_of_fused_modules_are_refused(make, name, text):
    model, calls = make().eval(), []
    x, timesteps, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 37), torch.arange(3)

    def run():
        with torch.inference_mode():
            model(x, timesteps, class_labels=labels)

    handle = kr_fast.optimize(model)
    run()
    hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    match = f"optimize: model must have hooks only on modules that run as they are .*, got one on {text}$"
    with pytest.raises(UserError, match=match):
        run()
    handle.restore()
    run()
    assert len(calls) == 1
    with pytest.raises(UserError, match=match):
        kr_fast.optimize(model)
    hook.remove()
    with kr_fast.optimize(model):
        run()


@pytest.mark.parametrize(
    "name", ["mid_block", "up_blocks.0.resnets.0", "mid_block.attentions.0", "down_blocks.0.resnets.0.conv1", "conv_in"]
)
def test_hooks_of_called_modules_run(name):
    model, calls = unet().eval(), []
    model.get_submodule(name).register_forward_hook(lambda _, __, result: calls.append(result.clone()))
    with torch.inference_mode():
        model(x := torch.randn(3, 1, 8, 8), 37, class_labels=torch.arange(3))
        with kr_fast.optimize(model):
            model(x, 37, class_labels=torch.arange(3))
    torch.testing.assert_close(calls[1], calls[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [unet, dit])
def test_a_second_optimize_leaves_the_first_as_it_was(make):
    model, x, timesteps, labels = make().eval(), torch.randn(3, 1, 8, 8), torch.full((3,), 37), torch.arange(3)
    with torch.inference_mode():
        before = model(x, timesteps, class_labels=labels).sample
        handle = kr_fast.optimize(model)
        want = model(x, timesteps, class_labels=labels).sample
        with pytest.raises(UserError, match="have its own forwards"):
            kr_fast.optimize(model)
        assert torch.equal(model(x, timesteps, class_labels=labels).sample, want)
        handle.restore()
        assert torch.equal(model(x, timesteps, class_labels=labels).sample, before)
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("_kr_fast")]


def test_hooks_registered_in_training_are_refused_where_they_would_not_run():
    for make, name in (
        (unet, "mid_block.resnets.0.conv1"),
        (unet, "conv_act"),
        (unet, "up_blocks.0.resnets.0.conv2"),
        (dit, "transformer_blocks.0.attn1.to_v"),
    ):
        model = make().train()
        with kr_fast.optimize(model, training=True) as handle:
            assert handle.patched
            model.get_submodule(name).register_full_backward_hook(lambda *_: None)
            with pytest.raises(UserError, match="model must have hooks only on modules that run as they are"):
                model(torch.randn(3, 1, 8, 8), torch.full((3,), 37), class_labels=torch.arange(3))
