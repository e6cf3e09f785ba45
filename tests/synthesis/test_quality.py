"""The tiers of quality as their contract states them, for every kind of solver, and what falls back to it."""

import logging

import pytest
import torch
from small_samplers import CLASSES, MILD, SOLVERS, make_sampler, make_unet, start

import kr_fast
from kr_fast.runtime.errors import UserError

diffusers = pytest.importorskip("diffusers")

IDS = torch.tensor([3, 1, 2**33, 12])
LABELS = IDS % CLASSES


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def loop_in_diffusers(monkeypatch, unet, scheduler, steps, guidance):
    """The images of a loop as anyone would write it, with the noise of the ids."""
    if type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler":
        scheduler.set_timesteps(steps)
    else:
        start(scheduler, steps)
    x = kr_fast.philox_normal(IDS, (3, 8, 8), seed=7) * (0.3 * float(getattr(scheduler, "init_noise_sigma", 1.0)))
    draw = torch.randn
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            if guidance is None:
                e = unet(inputs, t, class_labels=LABELS).sample
            else:
                both = torch.cat([LABELS, torch.full_like(LABELS, CLASSES)])
                e, null = unet(torch.cat([inputs, inputs]), t, class_labels=both).sample.chunk(2)
                e = null + guidance * (e - null)
            noise = kr_fast.philox_normal(IDS, (3, 8, 8), seed=7, stream=1 + step)
            monkeypatch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
            x = scheduler.step(e, t, x).prev_sample
            monkeypatch.setattr(torch, "randn", draw)
    return kr_fast.pack_uint8(x)


def sampler_of(unet, scheduler, quality, guidance):
    return make_sampler(unet, scheduler, 6, guidance_scale=guidance, micro_batch=4, noise_scale=0.3, quality=quality)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_exact_has_the_bits_of_diffusers_and_fused_is_60_db_near(monkeypatch, unet, name, guidance):
    scheduler = SOLVERS[name]
    exact = sampler_of(unet, scheduler, "exact", guidance)(IDS, LABELS)
    assert torch.equal(exact, loop_in_diffusers(monkeypatch, unet, scheduler, 6, guidance))
    inside = ((exact > 0) & (exact < 255)).float().mean()
    assert inside > 0.15, f"only {inside:.0%} of the bytes can tell a difference"
    fused = sampler_of(unet, scheduler, "fused", guidance)
    assert fused.table is not None
    error = (fused(IDS, LABELS).double() - exact.double()).square().mean()
    assert error <= 255**2 / 1e6, f"{10 * torch.log10(255**2 / error):.0f} dB"


class Curved(diffusers.DDIMScheduler):
    """Not linear in what it is given; draws two tensors a step."""

    def step(self, model_output, timestep, sample, **options):
        out = super().step(model_output, timestep, sample, **options)
        out.prev_sample = torch.tanh(out.prev_sample) + 0.1 * torch.randn(sample.shape) * torch.randn(sample.shape)
        return out


def test_a_scheduler_that_is_not_linear_runs_by_its_own_step(unet, caplog):
    scheduler = Curved(**MILD)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        sampler = make_sampler(unet, scheduler, 3)
    assert [r.message for r in caplog.records if "its own slower step()" in r.message] == [
        "Sampler: the scheduler runs by its own slower step(): StepTable: scheduler must be a linear solver, got "
        "Curved, which draws noise or clamps more than once in a step"
    ]
    assert sampler.table is None
    images = sampler(IDS, LABELS)
    order = [2, 0, 3, 1]
    assert torch.equal(images[order], sampler(IDS[order], LABELS[order]))  # its noise is that of the ids too
    assert torch.equal(images, make_sampler(unet, Curved(**MILD), 3, quality="exact")(IDS, LABELS))
    assert not torch.equal(images, make_sampler(unet, scheduler, 3, seed=8)(IDS, LABELS))


class Foreign(diffusers.DDIMScheduler):
    """With noise that is not the ids', as schedulers of diffusers have that sample a Brownian tree."""

    def step(self, model_output, timestep, sample, **options):
        out = super().step(model_output, timestep, sample, **options)
        out.prev_sample = out.prev_sample + 0.1 * torch.empty_like(sample).normal_()
        return out


@pytest.mark.parametrize("quality", ["exact", "fused", "fast"])
def test_noise_that_is_not_of_the_ids_is_refused(unet, quality):
    text = "scheduler must draw its noise by torch.randn .*got Foreign.*makes two images of one at step 0"
    with pytest.raises(UserError, match=text):
        make_sampler(unet, Foreign(**MILD), 3, quality=quality)


class Sizes(diffusers.DDIMScheduler):
    """Noise of torch.randn by sizes one by one."""

    def step(self, model_output, timestep, sample, **options):
        out = super().step(model_output, timestep, sample, **options)
        out.prev_sample = out.prev_sample + 0.1 * torch.randn(*sample.shape)
        return out


@pytest.mark.parametrize("quality", ["exact", "fused"])
def test_noise_by_sizes_one_by_one_is_that_of_the_ids(unet, quality):
    sampler = make_sampler(unet, Sizes(**MILD), 3, quality=quality)
    assert (sampler.table is None) == (quality == "exact")
    images = sampler(IDS, LABELS)
    assert torch.equal(images[[2, 0]], sampler(IDS[[2, 0]], LABELS[[2, 0]]))


def test_fast_is_bfloat16_and_says_so(unet):
    fused, fast = (make_sampler(unet, diffusers.DDIMScheduler(**MILD), 5, quality=q) for q in ("fused", "fast"))
    difference = (fused(IDS, LABELS).int() - fast(IDS, LABELS).int()).abs()
    assert 0 < difference.max() < 32
    assert fused.describe() != fast.describe()


@pytest.mark.parametrize("quality", ["exact", "fused", "fast"])
def test_autocast_of_the_caller_changes_no_image(unet, quality):
    sampler = make_sampler(unet, diffusers.DDIMScheduler(**MILD), quality=quality)
    want = sampler(IDS, LABELS)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(sampler(IDS, LABELS), want)


def test_guidance_interval(unet):
    """Outside of it the network is called with half the images; inside, guidance is what it always is."""
    calls = []
    hook = unet.register_forward_pre_hook(lambda m, a, k: calls.append(len(a[0])), with_kwargs=True)
    options = {"scheduler": diffusers.DDIMScheduler(**MILD), "steps": 5, "guidance_scale": 3.0}
    try:
        make_sampler(unet, guidance_interval=(0.2, 0.6), **options)(IDS, LABELS)
        assert calls == [8, 16, 16, 8, 8]
        calls.clear()
        middle = make_sampler(unet, guidance_interval=(0.2, 0.6), quality="exact", **options)(IDS, LABELS)
        assert calls == [8, 16, 16, 8, 8]
    finally:
        hook.remove()
    whole, never = make_sampler(unet, **options)(IDS, LABELS), make_sampler(unet, options["scheduler"], 5)(IDS, LABELS)
    fused = make_sampler(unet, guidance_interval=(0.2, 0.6), **options)(IDS, LABELS)
    assert (fused.int() - middle.int()).abs().max() <= 1
    assert not torch.equal(fused, whole)
    assert not torch.equal(fused, never)


@pytest.mark.parametrize("quality", ["exact", "fused"])
def test_guidance_of_0_is_the_unconditional_output_alone(unet, quality):
    options = {"quality": quality, "num_classes": CLASSES}
    images = make_sampler(unet, diffusers.DDIMScheduler(**MILD), guidance_scale=0.0, **options)(IDS, LABELS)
    free = make_unet()  # of no guidance, and with the null class in the place of each
    with torch.no_grad():
        free.class_embedding.weight[:CLASSES] = free.class_embedding.weight[CLASSES]
    want = make_sampler(free, diffusers.DDIMScheduler(**MILD), **options)(IDS, LABELS)
    assert (images.int() - want.int()).abs().max() <= 1
    assert (images.int() - make_sampler(unet, diffusers.DDIMScheduler(**MILD), **options)(IDS, LABELS).int()).any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quality": "best"}, "quality must be one of exact, fused, fast, got best"),
        ({"guidance_interval": (0.5, 0.5)}, r"guidance_interval must be two rising numbers in \[0, 1\]"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval must be two rising numbers"),
        ({"scheduler": object()}, "scheduler must have set_timesteps and step, got object"),
        ({"scheduler": diffusers.DDIMScheduler}, r"scheduler must be an instance, as DDIMScheduler\(\) is, got DDIM"),
        (
            {"scheduler": diffusers.RePaintScheduler()},
            "scheduler must run 3 steps, got RePaintScheduler, whose own code fails",
        ),
    ],
)
def test_bad_options(unet, options, text):
    with pytest.raises(UserError, match=text):
        make_sampler(unet, **options)
