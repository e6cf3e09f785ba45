"""optimize: values beside the unpatched network's own error, layouts, restore, the conditioning table, refusals."""

import copy

import pytest
import torch
from small_samplers import Ops
from torch import nn

import kr_fast
from kr_fast.backends import native, registry
from kr_fast.runtime.errors import UserError
from kr_fast.training.unet_blocks import nearest_2x

diffusers = pytest.importorskip("diffusers")
LAST = torch.channels_last
BLOCKS = {
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "plain": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
}


def network(kind="attention", **change):
    """16 and 32 channels in 8 groups: 2 a group, 6 over a skip connection; heads of 8 channels."""
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_class_embeds": 5,
        **BLOCKS[kind],
        **change,
    }
    model = diffusers.UNet2DModel(**options).eval()
    for parameter in model.parameters():  # diffusers' zeros and ones would hide a missing weight or bias
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, batch=3, size=(8, 8), dtype=torch.float32):
    draw = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, model.config.in_channels, *size, generator=draw).to(dtype)
    labels = torch.randint(0, 5, (batch,), generator=draw)
    return x, torch.tensor(37), (labels if model.class_embedding is not None else None)


@torch.inference_mode()
def run(model, arguments, **more):
    return model(*arguments, **more).sample


def check(model, arguments, dtype=torch.float32):
    """Ours is as near to the network in float64 as the network itself in ``dtype`` is; restore gives its bits back.

    In float32 3x3 convolutions by Winograd's algorithm err by about five times as much as by the definition.
    """
    model = model.to(dtype)
    theirs = run(model, arguments)
    double = copy.deepcopy(model).double()
    with registry.forced("reference"):
        want = run(double, (arguments[0].double(), *arguments[1:]))
    handle = kr_fast.optimize(model)
    ours = run(model, arguments)
    handle.restore()
    assert ours.dtype == theirs.dtype
    scale = float(want.abs().max())
    error, own = (float((y.double() - want).norm() / want.norm()) for y in (ours, theirs))
    assert error <= max(1.5 * own, 3e-6), (error, own)
    assert float((ours.double() - want).abs().max()) <= max(
        3 * float((theirs.double() - want).abs().max()), 1e-5 * scale
    )
    assert torch.equal(run(model, arguments), theirs)


# One image; and around 64, where diffusers' up-samplers change their layout.
@pytest.mark.parametrize("batch", [1, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_at_each_batch_size_and_dtype(batch, dtype):
    model = network()
    check(model, inputs(model, batch, dtype=dtype), dtype)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (14, 4), (22, 18)], ids=str)
def test_values_at_other_image_sizes(size):
    model = network()
    check(model, inputs(model, 3, size))


def test_values_at_odd_image_sizes():
    model = network(block_out_channels=(16,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
    check(model, inputs(model, 3, (7, 9)))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "plain"},
        {"num_class_embeds": None},
        {"layers_per_block": 2, "attention_head_dim": 16},
        {"attention_head_dim": 4},  # no compiled kernel for these heads
        {"attention_head_dim": None},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"downsample_padding": 0},
        {"mid_block_scale_factor": 2.0},
        {"mid_block_type": None},
        {"center_input_sample": True, "in_channels": 3, "out_channels": 2},
        {"time_embedding_type": "learned", "num_train_timesteps": 100},
        {"time_embedding_type": "fourier"},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_values_of_every_configuration(change):
    model = network(**change)
    x, t, labels = inputs(model)
    check(model, (x, t.float() if model.config.time_embedding_type == "fourier" else t, labels))


@pytest.mark.parametrize("timestep", [37, 37.5, torch.tensor([37]), torch.tensor([1, 500, 37])], ids=str)
def test_timesteps_of_each_form(timestep):
    model = network()
    x, _, labels = inputs(model)
    want = run(model, (x, timestep, labels))
    with kr_fast.optimize(model):
        torch.testing.assert_close(run(model, (x, timestep, labels)), want, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            assert torch.equal(model(x, timestep, labels, return_dict=False)[0], run(model, (x, timestep, labels)))


def test_class_embeddings_that_are_timesteps():
    model = network(class_embed_type="timestep")
    arguments = (*inputs(model)[:2], torch.tensor([3, 70, 900]))
    want = run(model, arguments)
    with kr_fast.optimize(model) as handle:
        torch.testing.assert_close(run(model, arguments), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match="prepare_steps: model must have class embeddings that are a table or none"):
            handle.prepare_steps([1])


def test_nearest_is_torchs(monkeypatch):
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=LAST)
    want = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(nearest_2x(x), want)
    monkeypatch.setattr(torch.Tensor, "numel", lambda self: 2**31)
    assert torch.equal(nearest_2x(x), want)
    assert nearest_2x(x).is_contiguous(memory_format=LAST)


def test_fewer_images_than_classes():
    model = network(num_class_embeds=1000)
    x, t, _ = inputs(model)
    check(model, (x, t, torch.tensor([0, 999, 500])))


@pytest.mark.parametrize("batch", [63, 64])
def test_ops_that_are_gone(batch):
    """No concatenation, division, separate norm or activation, and no copy to another layout."""
    model = network()
    model.requires_grad_(False)
    arguments = inputs(model, batch)
    with torch.no_grad(), kr_fast.optimize(model) as handle:
        handle.prepare_steps([37])
        with Ops() as ops:
            model(*arguments, step=torch.tensor(0))
    gone = {"cat", "div", "silu", "native_group_norm", "native_layer_norm", "_local_scalar_dense", "addmm"}
    assert not gone & set(ops.names)
    # Copies: the halves of the weight of each of the 4 shortcuts over a skip connection.
    assert ops.names.count("clone") == 2 * 4


with_vectors = pytest.mark.skipif(native.isa() == "scalar", reason="torch's convolutions are faster without vectors")


@with_vectors
def test_3x3_convolutions_by_winograd():
    """Two of each of 8 residual blocks, the up-sampler's and conv_out; too few tiles of 4x4 pixels take torch's."""
    model = network().requires_grad_(False)
    with torch.no_grad(), kr_fast.optimize(model) as handle:
        assert handle.patched["Conv2d"] == 8 * 2 + 2
        with Ops() as ops:
            model(*inputs(model, 64))
        assert ops.names.count("winograd_conv2d") == 18
        assert ops.names.count("add_") == 4 + 4  # second halves of shortcuts over skip connections; attentions
        with Ops() as ops:
            model(*inputs(model, 6))  # 24 tiles, or 6
        assert "winograd_conv2d" not in ops.names


@with_vectors
def test_packed_weights_follow_to_another_dtype():
    """Nothing packed in float32 is used on bfloat16, and back in float32 it is again."""
    model, arguments = network(), inputs(network(), 64)
    want = run(model, arguments)
    with kr_fast.optimize(model):
        model.to(torch.bfloat16)
        run(model, (arguments[0].bfloat16(), *arguments[1:]))
        model.to(torch.float32)  # now rounded to bfloat16, as the weights are
        torch.testing.assert_close(run(model, arguments), want, rtol=0, atol=0.1 * float(want.abs().max()))


def test_restore_undoes_everything():
    model = network()
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    buffers = [name for name, _ in model.named_buffers()]
    handle = kr_fast.optimize(model)
    assert model.conv_in.weight.shape == before["conv_in.weight"][0].shape
    assert set(model.state_dict()) == set(before)
    assert {name: count for name, count in handle.patched.items() if name != "Conv2d"} == {
        "UNet2DModel": 1,
        "ResnetBlock2D": 8,
        "Attention": 4,
        "AttnUpBlock2D": 1,
        "UpBlock2D": 1,
        "Upsample2D": 1,
    }
    handle.prepare_steps([1, 2])
    handle.restore()
    handle.restore()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [name for name, _ in model.named_buffers()] == buffers


def test_restore_keeps_weights_that_changed_meanwhile():
    model = network()
    with kr_fast.optimize(model):
        state = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_context_manager_restores_after_an_error():
    model = network()
    with pytest.raises(RuntimeError, match="stop"), kr_fast.optimize(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model)


def test_a_copy_of_an_optimized_network_is_its_own():
    model = network()
    arguments = inputs(model)
    handle = kr_fast.optimize(model)
    twin = copy.deepcopy(model)
    want = run(model, arguments)
    handle.restore()
    model.conv_in.weight.data.zero_()
    assert torch.equal(run(twin, arguments), want)


def test_moves_to_another_dtype():
    model = network()
    x, t, labels = inputs(model)
    with kr_fast.optimize(model) as handle:
        handle.prepare_steps([37])
        want = run(model, (x, t, labels))
        model.to(torch.bfloat16)
        for more in ({}, {"step": torch.tensor(0)}):
            got = run(model, (x.bfloat16(), t, labels), **more)
            assert got.dtype == torch.bfloat16
            assert (got.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("classes", [5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_looks_up_what_the_timestep_computes(classes, dtype):
    model = network(num_class_embeds=classes).to(dtype)
    x, _, labels = inputs(model, 7, dtype=dtype)
    with kr_fast.optimize(model) as handle:
        for timesteps in ([999, 37, 500], torch.tensor([0.0, 12.5])):
            handle.prepare_steps(timesteps)
            for step, t in enumerate(timesteps):
                want = run(model, (x, torch.as_tensor(t), labels))
                # The timestep is not looked at.
                assert torch.equal(run(model, (x, torch.tensor(-1), labels), step=torch.tensor(step)), want)
        model.prepare_steps([37])
        run(model, (x, 37, labels), step=torch.tensor([0]))


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_sampler_makes_the_same_images(guidance):
    model = network()
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    options = {"seed": 3, "guidance_scale": guidance, "num_classes": 4, "micro_batch": 16}
    sampler = kr_fast.Sampler(model, scheduler, 4, **options)
    ids, labels = torch.arange(20), torch.arange(20) % 4
    want = sampler(ids, labels)
    with kr_fast.optimize(model) as handle:
        fast = kr_fast.Sampler(model, scheduler, 4, **options)
        got = fast(ids, labels)
        assert torch.equal(fast(ids[5:9], labels[5:9]), got[5:9])
        handle.prepare_steps([900, 500, 100, 7])  # for a loop of the caller's: not the sampler's steps
        assert torch.equal(fast(ids, labels), got)
    # Rounding may move a value over the border between two bytes.
    difference = (got.int() - want.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert torch.equal(sampler(ids, labels), want)


def test_conditional_unet_keeps_its_values():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    arguments = torch.randn(2, 4, 8, 8), 37, torch.randn(2, 5, 12)
    want = run(model, arguments)
    with kr_fast.optimize(model) as handle:
        assert handle.patched["ResnetBlock2D"] == 8
        torch.testing.assert_close(run(model, arguments), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match="prepare_steps: model must be an optimized UNet2DModel or DiT"):
            handle.prepare_steps([1])
    assert torch.equal(run(model, arguments), want)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.Conv2d(1, 1, 3),
            r"model must be diffusers' UNet2DModel, .* or DiTTransformer2DModel, got Conv2d",
        ),
        (
            lambda: network(down_block_types=("SkipDownBlock2D", "DownBlock2D")),
            "model must have blocks of .*, got SkipDownBlock2D",
        ),
        (lambda: network(act_fn="gelu"), "model must have residual blocks of ResnetBlock2D with SiLU .*, got GELU"),
        (lambda: kr_fast.optimize(network()).model, r"model must have its own forwards \(call restore\(\)"),
    ],
    ids=["class", "block", "activation", "twice"],
)
def test_unsupported_models_are_named(make, text):
    with pytest.raises(UserError, match="optimize: " + text):
        kr_fast.optimize(make())


def test_a_refused_model_is_left_as_it_was():
    model = network(act_fn="gelu")
    arguments = inputs(model)
    want = run(model, arguments)
    with pytest.raises(UserError):
        kr_fast.optimize(model)
    assert torch.equal(run(model, arguments), want)


def test_bad_calls_are_named():
    model = network()
    x, t, labels = inputs(model)
    with kr_fast.optimize(model) as handle, torch.no_grad():
        with pytest.raises(UserError, match="class_labels must be given for a model with class embedding Embedding"):
            model(x, t)
        with pytest.raises(UserError, match=r"step must come after prepare_steps\(timesteps\), got no table"):
            model(x, t, labels, step=torch.tensor(0))
        with pytest.raises(UserError, match="timesteps must be a sequence of at least one timestep"):
            handle.prepare_steps([])
        handle.prepare_steps([1])
        with pytest.raises(UserError, match="step must be a 0-dim int64 tensor, got 0"):
            model(x, t, labels, step=0)
        with torch.enable_grad(), pytest.raises(UserError, match=r"model must be called under torch.no_grad\(\)"):
            model(x, t, labels)
    fourier = network(time_embedding_type="fourier")
    with (
        kr_fast.optimize(fourier) as handle,
        pytest.raises(UserError, match="prepare_steps: model must not divide by its timestep"),
    ):
        handle.prepare_steps([1])


def test_compiles_without_graph_breaks():
    model = network()
    arguments = inputs(model)
    with kr_fast.optimize(model) as handle, torch.no_grad():
        handle.prepare_steps([37])
        want = model(*arguments, step=torch.tensor(0)).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments, step=torch.tensor(0)).sample, want)
