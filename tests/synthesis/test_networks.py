"""Networks other than UNet2DModel: transformers with an autoencoder, networks that read text, plain callables."""

import weakref

import pytest
import torch
from small_samplers import MILD, make_sampler, make_unet

import kr_fast
from kr_fast.models import unet
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import Network, PromptNetwork

diffusers = pytest.importorskip("diffusers")

IDS = torch.tensor([3, 1, 2**33, 12, 5])
LABELS = torch.tensor([0, 2, 1, 0, 2])
DDIM = diffusers.DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=2e-3)


def make_dit(out_channels=4):
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
    ).eval()


def make_vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


@pytest.mark.parametrize("out_channels", [4, 8])  # 8: with predicted variances, which are not used
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_dit_with_an_autoencoder_as_in_diffusers_pipeline(out_channels, guidance):
    dit, vae = make_dit(out_channels), make_vae()
    sampler = make_sampler(dit, DDIM, 4, vae=vae, guidance_scale=guidance, micro_batch=5)
    got = sampler(IDS, LABELS)
    assert got.shape == (5, 16, 16, 3)
    assert sampler.output_shape == (3, 16, 16)

    DDIM.set_timesteps(4)
    x = kr_fast.philox_normal(IDS, (4, 8, 8), seed=7)
    with torch.no_grad():
        for t in DDIM.timesteps:
            e = dit(x, timestep=t.expand(5), class_labels=LABELS).sample[:, :4]
            if guidance is not None:
                null = dit(x, timestep=t.expand(5), class_labels=torch.full_like(LABELS, 3)).sample[:, :4]
                e = null + guidance * (e - null)
            x = DDIM.step(e, t, x).prev_sample
        want = kr_fast.pack_uint8(vae.decode(x / vae.config.scaling_factor).sample)
    assert ((want > 0) & (want < 255)).float().mean() > 0.5
    assert (got.int() - want.int()).abs().max() <= 1


def test_dit_and_autoencoder_are_in_the_description():
    base = make_sampler(make_dit(), DDIM, 4, vae=make_vae()).describe()
    other = make_vae()
    with torch.no_grad():
        other.decoder.conv_in.bias += 1
    assert make_sampler(make_dit(), DDIM, 4, vae=other).describe() != base
    assert make_sampler(make_dit(), DDIM, 4).describe() != base
    assert make_sampler(make_dit(), DDIM, 4, vae=make_vae()).describe() == base


def test_crop_is_of_the_decoded_image():
    sampler = make_sampler(make_dit(), DDIM, 2, vae=make_vae(), crop=(15, 12))
    assert sampler(IDS, LABELS).shape == (5, 15, 12, 3)
    with pytest.raises(UserError, match=r"crop must lie inside the \(16, 16\) image, got \(17, 3\)"):
        make_sampler(make_dit(), DDIM, 2, vae=make_vae(), crop=(17, 3))


def make_reader():
    torch.manual_seed(2)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
    ).eval()


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_networks_that_read_text(guidance):
    unet = make_reader()
    prompts = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    got = make_sampler(PromptNetwork(unet, prompts), DDIM, 3, guidance_scale=guidance, micro_batch=5)(IDS, LABELS)
    DDIM.set_timesteps(3)
    x = kr_fast.philox_normal(IDS, (3, 8, 8), seed=7)
    with torch.no_grad():
        for t in DDIM.timesteps:
            e = unet(x, t, encoder_hidden_states=prompts[LABELS]).sample
            if guidance is not None:
                null = unet(x, t, encoder_hidden_states=prompts[[3] * 5]).sample
                e = null + guidance * (e - null)
            x = DDIM.step(e, t, x).prev_sample
    assert (got.int() - kr_fast.pack_uint8(x).int()).abs().max() <= 1


def test_prompts_are_checked_and_described():
    unet = make_reader()
    with pytest.raises(UserError, match=r"unet must come as PromptNetwork\(unet, prompts\) if it reads text"):
        make_sampler(unet, DDIM, 3)
    with pytest.raises(UserError, match=r"prompts must be floating \[classes \+ 1, tokens, width\], got \[4, 6\]"):
        PromptNetwork(unet, torch.zeros(4, 6))
    with pytest.raises(UserError, match="prompts must have the network's width 6, got 7"):
        PromptNetwork(unet, torch.zeros(4, 5, 7))
    a, b = (make_sampler(PromptNetwork(unet, torch.full((4, 5, 6), v)), DDIM, 3).describe() for v in (0.0, 1.0))
    assert a != b
    with pytest.raises(UserError, match=r"labels must lie in \[0, 4\), got \[0, 4\]"):
        make_sampler(PromptNetwork(unet, torch.zeros(4, 5, 6)), DDIM, 3)(IDS[:2], torch.tensor([0, 4]))


def test_a_network_of_ones_own():
    class Own(Network):
        def __init__(self):
            super().__init__(None)
            self.shape, self.embeddings = (2, 4, 4), 3

        def __call__(self, x, t, labels, step=None):
            return x * 0.5 + labels.view(-1, 1, 1, 1) * 0.1

        def digest(self):
            return "own"

    sampler = make_sampler(Own(), DDIM, 3)
    images = sampler(IDS, LABELS)
    assert images.shape == (5, 4, 4, 2)
    assert torch.equal(images[[4, 2]], sampler(IDS[[4, 2]], LABELS[[4, 2]]))
    assert sampler.describe()["network"] == "own"


def test_optimized_networks_look_their_conditioning_up(monkeypatch):
    """Samplers of other steps may share the network; restored, it is called as it was."""
    unet, scheduler = make_unet(), diffusers.DDIMScheduler(**MILD)
    samplers = [make_sampler(unet, scheduler, steps, guidance_scale=g) for steps, g in ((3, None), (5, 2.0))]
    plain, descriptions = [s(IDS, LABELS) for s in samplers], [s.describe() for s in samplers]
    calls = []
    with kr_fast.optimize(unet):
        forward = unet.forward
        monkeypatch.setattr(unet, "forward", lambda *a, **k: calls.append(k.get("step")) or forward(*a, **k))
        fast = [s(IDS, LABELS) for s in samplers for _ in range(2)]
        again = samplers[0](IDS, LABELS)
        assert [int(step) for step in calls] == [*range(3), *range(3), *range(5), *range(5), *range(3)]
        assert all(s.describe() != d for s, d in zip(samplers, descriptions, strict=True))
        monkeypatch.undo()
    assert torch.equal(fast[0], fast[1])
    assert torch.equal(fast[0], again)
    for a, b in ((fast[0], plain[0]), (fast[2], plain[1])):
        assert (a.int() - b.int()).abs().max() <= 1
    assert torch.equal(samplers[0](IDS, LABELS), plain[0])
    assert samplers[0].describe() == descriptions[0]


def test_skip_connections_are_freed_when_they_were_used():
    model, skips, living = make_unet(), [], []

    def note(module, arguments, more):
        living.append(sum(skip() is not None for skip in skips))
        skips.append(weakref.ref(more["skip"]))

    kr_fast.optimize(model)
    for resnet in model.up_blocks[-1].resnets:
        resnet.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        model(torch.randn(2, 3, 8, 8), torch.tensor(3), torch.tensor([0, 1]))
    assert living == [0, 0]


def test_hooks_that_copy_the_arguments_of_blocks_change_nothing():
    """As those of FSDP and Accelerate do: the lists of skip connections, which blocks empty, are not the network's."""
    model, call = unet(8, 8, 1, 2, widths=(8, 8)), (torch.randn(2, 1, 8, 8), torch.tensor(3), torch.tensor([0, 1]))
    kr_fast.optimize(model.eval())
    with torch.inference_mode():
        expected = model(*call).sample
        for block in model.up_blocks:
            block.register_forward_pre_hook(lambda _, arguments: torch.utils._pytree.tree_map(lambda x: x, arguments))
        assert torch.equal(model(*call).sample, expected)
