"""What a sampler refuses before anything is written, each in one line that names the cause."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_samplers import CLASSES, MILD, make_sampler, make_unet

import kr_fast
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import LabelPlan, PromptNetwork, synthesize
from kr_fast.synthesis.latents import Decoder

diffusers = pytest.importorskip("diffusers")

IDS, LABELS = torch.arange(4), torch.arange(4) % CLASSES


def network(**options):
    given = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**given | options).eval()


@pytest.mark.parametrize("quality", ["exact", "fused"])
@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        (
            diffusers.UniPCMultistepScheduler(solver_type="bh1"),
            r"finite samples for finite outputs, got UniPCMultistepScheduler\(solver_type='bh1'\), whose own step\(\) "
            "gives NaN or inf at step 4",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True),
            r"run 5 steps, got DPMSolverMultistepScheduler\(.*use_karras_sigmas=True\), whose own code fails "
            r"\(IndexError: index",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            r"whose own code fails \(ValueError: `mu` must be passed",
        ),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "have a fixed variance .*'learned_range'"),
        (diffusers.RePaintScheduler(), "whose own code fails .*missing 2 required positional arguments"),
    ],
)
def test_schedulers_that_fail_by_themselves_are_named(scheduler, text, quality):
    """The network is not blamed for them."""
    with pytest.raises(UserError, match=f"StepTable: scheduler must .*{text}"):
        make_sampler(make_unet(), scheduler, 5, quality=quality)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_embed_type": "identity"}, "look its labels up .*got class_embed_type 'identity'"),
        ({"class_embed_type": "projection"}, "look its labels up .*got class_embed_type 'projection'"),
        ({"out_channels": 6}, r"return as many channels as it takes \(variances .*got 6 for 3"),
        ({"sample_size": 7}, "image_shape must be a multiple of 2: the network has 2 levels, got 7 px"),
        (
            {
                "sample_size": (8, 6),
                "block_out_channels": (8,) * 3,
                "down_block_types": ("DownBlock2D",) * 3,
                "up_block_types": ("UpBlock2D",) * 3,
            },
            "a multiple of 4: the network has 3 levels, got 8 x 6 px",
        ),
    ],
)
def test_networks_of_diffusers_that_do_not_fit(options, text):
    with pytest.raises(UserError, match=f"Sampler: .*{text}"):
        make_sampler(network(**options))


def test_a_network_without_weights():
    with torch.device("meta"):
        empty = network()
    with pytest.raises(UserError, match="Sampler: unet must have weights, got tensors on the device meta"):
        make_sampler(empty)


def test_a_network_in_another_dtype():
    with pytest.raises(UserError, match="Sampler: unet must be float32, bfloat16 or float16 .*, got float64"):
        make_sampler(make_unet().double())
    assert make_sampler(make_unet().double(), quality="exact")(IDS, LABELS).shape == (4, 8, 8, 3)


def test_labels_embedded_as_numbers_are_taken():
    assert make_sampler(network(class_embed_type="timestep"))(IDS, LABELS).shape == (4, 8, 8, 3)


def test_guidance_asks_what_the_last_embedding_is():
    ten = network(num_class_embeds=10)
    with pytest.raises(UserError, match="num_classes must be given for guidance: 9 if the last of the network's 10"):
        make_sampler(ten, guidance_scale=2.0, num_classes=None)
    with pytest.raises(UserError, match="unet must have a null class beside its 10 classes for guidance, got 10 class"):
        make_sampler(ten, guidance_scale=2.0, num_classes=10)
    with pytest.raises(UserError, match="num_classes must be 9 for guidance, whose null class is the last .*got 8"):
        make_sampler(ten, guidance_scale=2.0, num_classes=8)
    with pytest.raises(UserError, match="num_classes must be at most the network's 10 class embeddings, got 11"):
        make_sampler(ten, num_classes=11)
    guided = make_sampler(ten, guidance_scale=2.0, num_classes=9)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 9\), got \[6, 9\]"):
        guided(IDS, IDS + 6)
    assert guided(IDS, IDS + 5).shape == (4, 8, 8, 3)
    assert make_sampler(ten)(IDS, IDS + 6).shape == (4, 8, 8, 3)  # without guidance all are classes
    with pytest.raises(UserError, match=r"labels must lie in \[0, 9\)"):
        make_sampler(ten, num_classes=9)(IDS, IDS + 6)


def test_guidance_of_a_callable_uses_the_label_behind_its_classes():
    seen = []

    def call(x, t, class_labels):
        seen.append(class_labels.tolist())
        return 0.1 * x

    options = {"image_shape": (1, 4, 4), "micro_batch": 2, "guidance_scale": 2.0}
    with pytest.raises(UserError, match="unet must have class embeddings .*a callable num_classes says it"):
        make_sampler(call, **options)
    make_sampler(call, num_classes=5, **options)(IDS[:2], LABELS[:2])
    assert seen == [[0, 1, 5, 5]] * 3


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from([RuntimeError, ValueError, AssertionError, KeyError, AttributeError, NotImplementedError]),
    text=st.text(max_size=30),
    at=st.integers(0, 2),
)
def test_a_failing_network_is_one_line_with_its_own_message(kind, text, at):
    calls = []

    def call(x, t, class_labels):
        calls.append(1)
        if len(calls) > at:
            raise kind(text)
        return 0.1 * x

    with pytest.raises(UserError) as result:
        make_sampler(call, image_shape=(1, 4, 4))(IDS, LABELS)
    message = str(result.value)
    assert message.startswith("Sampler: unet must run on float32 [8, 1, 4, 4] with labels [8], got the error")
    assert kind.__name__ in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("answer", [None, 3.0, np.zeros((8, 1, 4, 4)), torch.zeros(8), {"sample": 1}])
def test_another_kind_of_answer_is_named(answer):
    with pytest.raises(UserError, match=r"unet must return \[8, 1, 4, 4\], the shape of its input, got"):
        make_sampler(lambda x, t, class_labels: answer, image_shape=(1, 4, 4))(IDS, LABELS)


BAD = [math.nan, math.inf, -math.inf, -1, 0, 10**30, "3", None, True]


@pytest.mark.parametrize(
    "name", ["micro_batch", "seed", "steps", "noise_scale", "guidance_scale", "num_classes", "eta"]
)
@pytest.mark.parametrize("value", BAD)
def test_every_number_at_its_limits(name, value):
    fine = {
        ("seed", 0),
        ("noise_scale", 10**30),
        ("guidance_scale", -1),
        ("guidance_scale", 0),
        ("guidance_scale", None),
        ("guidance_scale", 10**30),
        ("num_classes", None),
        ("eta", 0),
        ("eta", None),
        ("micro_batch", 10**30),
    }
    if (name, value) in fine and value is not True:
        return  # a number, or none, that it may have
    with pytest.raises(UserError):
        make_sampler(make_unet(), **{name: value})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_shape": (3, 8)}, "image_shape must be 3 integers"),
        ({"image_shape": (3, 8, 8.5)}, "image_shape must be an integer, at least 1, got 8.5"),
        ({"crop": 4}, "crop must be 2 integers, got 4"),
        ({"crop": (4, -1)}, "crop must be an integer, at least 1, got -1"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval must be two rising numbers"),
        ({"guidance_interval": (0.0,)}, "guidance_interval must be two rising numbers"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two rising numbers"),
        ({"guidance_interval": ("0", "1")}, "guidance_interval must be two rising numbers"),
    ],
)
def test_shapes_and_intervals(options, text):
    with pytest.raises(UserError, match=f"Sampler: {text}"):
        make_sampler(make_unet(), **options)


@pytest.mark.parametrize("quality", ["fused", "exact"])
def test_an_interval_between_two_steps_guides_nothing_and_is_refused(quality):
    options = {"steps": 4, "quality": quality, "num_classes": 9}
    unguided = make_sampler(network(num_class_embeds=10), guidance_interval=(0.3, 0.4), **options)
    assert unguided.guidance_scale is None  # where there is none, its interval does not matter
    for interval, nearest in (((0.3, 0.4), 1), ((0.1, 0.2), 1), ((0.8, 1.0), 3), ((0.01, 0.05), 0)):
        rule = f"guidance_interval must hold one of the 4 solver steps, the nearest of which is at {nearest} / 4, got"
        with pytest.raises(UserError, match=f"Sampler: {rule}"):
            make_sampler(network(num_class_embeds=10), guidance_scale=2.0, guidance_interval=interval, **options)
    heun = diffusers.HeunDiscreteScheduler(**MILD)  # seven calls of the network
    with pytest.raises(UserError, match="hold one of the 7 solver steps"):
        make_sampler(network(num_class_embeds=10), heun, guidance_scale=2.0, guidance_interval=(0.3, 0.4), **options)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_ids_and_labels_are_arrays_of_any_integer_dtype(dtype):
    sampler = make_sampler(make_unet())
    result = sampler(np.arange(4, dtype=dtype), (np.arange(4) % CLASSES).astype(dtype)[:, None])
    assert torch.equal(result, sampler(IDS, LABELS))


def vae(**options):
    torch.manual_seed(1)
    given = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**given | options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},  # Stable Diffusion 3
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},  # Flux
        {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 0.5, 3.0]},  # the form of SDXL's
    ],
)
def test_latents_are_scaled_and_shifted_as_the_pipelines_do(options):
    model, x = vae(**options), torch.randn(2, 4, 4, 4)
    config = model.config
    if config.latents_mean is not None:  # as in StableDiffusionXLPipeline
        mean, std = (torch.tensor(value).view(1, 4, 1, 1) for value in (config.latents_mean, config.latents_std))
        latents = x * std / config.scaling_factor + mean
    else:  # as in StableDiffusion3Pipeline and FluxPipeline
        latents = x / config.scaling_factor + (config.shift_factor or 0)
    decoder = Decoder(model, 4)
    torch.testing.assert_close(decoder.scaled(x), latents)
    with torch.no_grad():
        torch.testing.assert_close(decoder(x), model.decode(latents).sample)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: vae(latents_mean=[0.0] * 4), "have latents_mean and latents_std, or shift_factor, or none of them"),
        (
            lambda: vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=1.0),
            r"have .* or none of them, got .*shift_factor 1.0",
        ),
        (lambda: vae(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "have 4 numbers in latents_mean, got 3"),
        (lambda: vae(latent_channels=2), "decode the network's 4 channels, got 2 latent_channels"),
        (lambda: torch.nn.Linear(2, 2), "be diffusers' AutoencoderKL, got Linear"),
    ],
)
def test_autoencoders_that_do_not_fit(model, text):
    with pytest.raises(UserError, match=f"Sampler: vae must {text}"):
        make_sampler(make_unet(channels=4), vae=model())


def test_an_autoencoder_that_returns_nan_is_named():
    """Not the network; and not black images, which NaN would become."""
    model = vae()
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(UserError, match="Sampler: vae must return finite values, got NaN or inf in torch.float32"):
        make_sampler(make_unet(channels=4), vae=model)(IDS, LABELS)


@pytest.mark.parametrize(
    ("option", "value"),
    [("class_embed_type", "timestep"), ("num_class_embeds", 3), ("time_cond_proj_dim", 8)],
)
def test_networks_that_read_more_than_a_prompt(option, value):
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=4,
        **{option: value},
    )
    with pytest.raises(UserError, match=f"PromptNetwork: model must have no {option}"):
        PromptNetwork(model, torch.zeros(3, 2, 6))


def broken(**options):
    unet = make_unet(**options)
    with torch.no_grad():
        unet.conv_out.bias.fill_(math.nan)
    return unet


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: make_sampler(broken()), "finite values, got NaN or inf for ids in .5, 5., first at step 0"),
        (lambda: make_sampler(lambda x, t, class_labels: x[:, :1], image_shape=(3, 4, 4)), "unet must return"),
        (lambda: make_sampler(lambda x, t, class_labels: 1 / 0, image_shape=(3, 4, 4)), "ZeroDivisionError"),
        (lambda: make_sampler(make_unet(), micro_batch=10**13), "micro_batch must fit the .* GiB of free memory"),
        (lambda: make_sampler(make_unet(embeddings=2)), r"labels must lie in \[0, 2\)"),
    ],
)
def test_nothing_is_left_by_what_cannot_work(tmp_path, build, text):
    plan = LabelPlan.counts([0, 0, 1])
    with pytest.raises(UserError, match=text):
        synthesize(build(), plan, tmp_path / "data", ids=range(5, 9))
    assert not (tmp_path / "data").exists()


def test_labels_of_a_plan_are_checked_before_the_first_image(tmp_path):
    guided = make_sampler(network(num_class_embeds=10), guidance_scale=2.0, num_classes=9)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 9\), got \[0, 9\]"):
        synthesize(guided, LabelPlan.balanced(10), tmp_path / "data", count=4)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ids": range(10**15)}, "shard_size must be at least 1000000000 for 1000000000000000 images, got 16384"),
        ({"ids": range(10**15), "shard_size": 10**12}, "out must have room for .* GiB of images, got .* GiB free in"),
        ({"ids": range(10**12 - 1, 10**12 + 1), "format": "webdataset"}, r"ids must be below 10\^12 in the format"),
        ({"ids": range(4), "shard_size": 0}, "shard_size must be at least 1, got 0"),
    ],
)
def test_sets_that_do_not_fit(tmp_path, options, text):
    with pytest.raises(UserError, match=f"synthesize: {text}"):
        synthesize(make_sampler(make_unet()), LabelPlan.balanced(2), tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_a_preflight_changes_no_image():
    unet, plan = make_unet(), LabelPlan.balanced(2)
    unet.train()
    sampler = make_sampler(unet, diffusers.DDIMScheduler(**MILD), guidance_scale=2.0, quality="fast")
    sampler.preflight(IDS, LABELS)
    assert unet.training
    expected = make_sampler(unet, diffusers.DDIMScheduler(**MILD), guidance_scale=2.0, quality="fast")(
        IDS, plan.labels(IDS)
    )
    assert torch.equal(sampler(IDS, plan.labels(IDS)), expected)
    assert kr_fast.Sampler is type(sampler)
