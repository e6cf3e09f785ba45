"""Sampler: bytes that depend on the id alone, diffusers' own loop as oracle, and every refusal."""

import json

import pytest
import torch
from small_samplers import CLASSES, MILD, make_sampler, make_unet, start

import kr_fast
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import LabelPlan

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet():
    return make_unet()


SETUPS = {
    "ddim": {},
    "stochastic and guided": {"eta": 1.0, "guidance_scale": 2.0},
    "flow": {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "noise_scale": 1.1},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_an_image_depends_on_its_id_and_label_alone(unet, setup):
    sampler = make_sampler(unet, **SETUPS[setup])
    ids = torch.tensor([4, 0, 11, 2**40 + 3, 7, 100, 1, 2, 3, 5, 6])  # more than one micro-batch, with a tail
    labels = ids % CLASSES
    images = sampler(ids, labels)
    assert images.dtype == torch.uint8
    assert images.shape == (11, 8, 8, 3)
    assert len(images.flatten(1).unique(dim=0)) == 11
    assert torch.equal(images, sampler(ids, labels))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images[order], sampler(ids[order], labels[order]))
    assert torch.equal(images, torch.cat([sampler(ids[:4], labels[:4]), sampler(ids[4:], labels[4:])]))
    assert torch.equal(images[5:6], sampler(ids[5:6], labels[5:6]))
    company = torch.cat([torch.arange(200, 205), ids[2:4]])
    assert torch.equal(images[2:4], sampler(company, company % CLASSES)[5:])


def test_trajectories_lead_from_the_noise_to_the_images(unet):
    sampler = make_sampler(unet, guidance_scale=2.0, noise_scale=1.3, steps=6)
    ids = torch.arange(20, 29)
    samples = sampler.trajectories(ids, ids % CLASSES)
    assert samples.shape == (7, 9, 3, 8, 8)
    torch.testing.assert_close(samples[0], 1.3 * kr_fast.philox_normal(ids, (3, 8, 8), seed=sampler.seed))
    assert torch.equal(kr_fast.pack_uint8(samples[-1]), sampler(ids, ids % CLASSES))
    assert torch.equal(sampler.trajectories(ids, ids % CLASSES, every=3), samples[::3])
    assert sampler.trajectories(ids[:0], ids[:0], every=6).shape == (2, 0, 3, 8, 8)
    with pytest.raises(UserError, match="Sampler: every must divide the 6 steps, got 4"):
        sampler.trajectories(ids, ids % CLASSES, every=4)
    with pytest.raises(UserError, match="Sampler: scheduler must be one that compiles to a step table, .*got DDIM"):
        make_sampler(unet, quality="exact").trajectories(ids, ids % CLASSES)


def test_every_part_of_the_address_counts(unet):
    ids, labels = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    images = make_sampler(unet)(ids, labels)
    assert not torch.equal(images, make_sampler(unet)(ids, labels + 1))
    assert not torch.equal(images, make_sampler(unet)(ids + 1, labels))
    for options in ({"seed": 8}, {"steps": 4}, {"noise_scale": 1.2}, {"eta": 1.0}, {"guidance_scale": 3.0}):
        assert not torch.equal(images, make_sampler(unet, **options)(ids, labels)), options
    for value in (None, 1, 1.0):
        assert torch.equal(images, make_sampler(unet, guidance_scale=value)(ids, labels))


LOOPS = {
    "ddim": (diffusers.DDIMScheduler(**MILD, clip_sample=False), 0.0),
    "ddim clip": (diffusers.DDIMScheduler(**MILD, clip_sample=True), 0.0),
    "ddim eta": (diffusers.DDIMScheduler(**MILD, clip_sample=True), 0.8),
    "ddim v": (diffusers.DDIMScheduler(**MILD, prediction_type="v_prediction", clip_sample=False), 0.0),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 0.0),
    "euler": (diffusers.EulerDiscreteScheduler(**MILD), 0.0),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_against_a_loop_in_diffusers(unet, name, guidance):
    scheduler, eta = LOOPS[name]
    ids, steps = torch.tensor([3, 1, 2**33, 12]), 5
    labels = ids % CLASSES
    sampler = make_sampler(unet, scheduler, steps, eta=eta, guidance_scale=guidance, micro_batch=4, noise_scale=0.3)
    got = sampler(ids, labels)

    start(scheduler, steps)
    x = kr_fast.philox_normal(ids, (3, 8, 8), seed=7) * 0.3 * float(getattr(scheduler, "init_noise_sigma", 1.0))
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            e = unet(inputs, t, class_labels=labels).sample
            if guidance is not None:
                null = unet(inputs, t, class_labels=torch.full_like(labels, CLASSES)).sample
                e = null + guidance * (e - null)
            noise = kr_fast.philox_normal(ids, (3, 8, 8), seed=7, stream=1 + step)
            extra = {"eta": eta, "variance_noise": noise} if eta else {}
            x = scheduler.step(e, t, x, **extra).prev_sample
    want = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    inside = ((want > 0) & (want < 255)).float().mean()
    assert inside > 0.2, f"only {inside:.0%} of the bytes can tell a difference"
    difference = (got.int() - want.int()).abs()
    assert difference.max() <= 1  # the network at another memory layout and batch, then a rounding to bytes
    assert (difference > 0).float().mean() < 0.02


def test_timesteps_reach_the_network_as_the_scheduler_has_them():
    seen = []

    def network(x, t, class_labels):
        seen.append(t)
        return torch.zeros_like(x)

    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.DDIMScheduler()):
        seen.clear()
        make_sampler(network, scheduler, 7, image_shape=(1, 4, 4))(torch.arange(2), torch.zeros(2, dtype=torch.int64))
        start(scheduler, 7)
        assert [t.dtype for t in seen] == [scheduler.timesteps.dtype] * 7
        assert torch.equal(torch.stack(seen), scheduler.timesteps)


def test_guidance_is_one_call_with_the_null_class_last(unet):
    calls = []
    hook = unet.register_forward_pre_hook(
        lambda m, a, k: calls.append((len(a[0]), k["class_labels"])), with_kwargs=True
    )
    try:
        make_sampler(unet, guidance_scale=2.0, steps=2)(torch.arange(3), torch.tensor([0, 1, 2]))
    finally:
        hook.remove()
    assert [n for n, _ in calls] == [16, 16]  # 2 x micro_batch, padded
    assert calls[0][1].tolist() == [0, 1, 2, 2, 2, 2, 2, 2] + [CLASSES] * 8


def test_stream_and_plan(unet):
    sampler, plan = make_sampler(unet, micro_batch=4), LabelPlan.counts([1, 2, 1])
    batches = list(sampler.stream(plan, range(3, 14)))
    assert [len(b.ids) for b in batches] == [4, 4, 3]
    ids = torch.cat([b.ids for b in batches])
    assert ids.tolist() == list(range(3, 14))
    assert torch.equal(torch.cat([b.labels for b in batches]), plan.labels(ids))
    assert torch.equal(torch.cat([b.images for b in batches]), sampler(ids, plan.labels(ids)))
    again = list(sampler.stream(plan, iter([9, 4])))
    assert torch.equal(again[0].images, torch.cat([b.images for b in batches])[[6, 1]])
    assert list(sampler.stream(plan, range(0))) == list(sampler.stream(plan, iter([]))) == []
    last = 2**63 - 1
    assert next(sampler.stream(plan, range(last - 2, last + 1, 2))).ids.tolist() == [last - 2, last]
    with pytest.raises(UserError, match=r"ids must be integers \[N\], got list of 2"):
        next(sampler.stream(plan, [1.5, 2.5]))  # which were cut down to 1 and 2


def test_crop_padding_networks_and_one_channel():
    unet = make_unet(channels=1, size=8)
    ids, labels = torch.arange(5), torch.arange(5) % CLASSES
    whole = make_sampler(unet)(ids, labels)
    assert whole.shape == (5, 8, 8, 1)
    assert torch.equal(make_sampler(unet, crop=(7, 5))(ids, labels), whole[:, :7, :5])
    assert make_sampler(unet, crop=(7, 5))(ids[:0], labels[:0]).shape == (0, 7, 5, 1)


def test_network_without_classes():
    unet = make_unet(embeddings=None)
    images = make_sampler(unet)(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert images.shape == (3, 8, 8, 3)


def test_network_modes_gradients_and_results_are_ordinary(unet):
    unet.train()
    try:
        images = make_sampler(unet)(torch.arange(2), torch.tensor([0, 1]))
        assert unet.training
        assert all(p.grad is None and p.requires_grad for p in unet.parameters())
    finally:
        unet.eval()
    assert not images.is_inference()
    images[0, 0, 0, 0] = 3  # a tensor of inference mode would refuse


def test_modules_keep_their_modes_and_none_trains_meanwhile():
    unet, during = make_unet(), []
    unet.train()
    unet.mid_block.eval()  # frozen
    unet.up_blocks[0].register_forward_pre_hook(lambda *_: during.extend(m.training for m in unet.modules()))
    modes = [m.training for m in unet.modules()]
    for root in (True, False):
        unet.training = modes[0] = root
        make_sampler(unet)(torch.arange(2), torch.tensor([0, 1]))
        assert [m.training for m in unet.modules()] == modes
    assert not any(during)


def test_bfloat16_network(unet):
    ids, labels = torch.arange(4), torch.arange(4) % CLASSES
    half = make_sampler(make_unet().bfloat16())(ids, labels)
    full = make_sampler(unet)(ids, labels)
    assert (half.int() - full.int()).abs().float().mean() < 4


@pytest.mark.parametrize(
    ("ids", "labels", "text"),
    [
        (torch.tensor([0, -1]), torch.tensor([0, 0]), r"ids must be at least 0, got \[-1, 0\]"),
        (torch.tensor([3, 4, 3]), torch.tensor([0, 0, 0]), "ids must not repeat, got 1 repeated"),
        (torch.tensor([0, 1]), torch.tensor([0]), "labels must have one entry for each of the 2 ids, got 1"),
        (torch.tensor([0, 1]), torch.tensor([0, 4]), r"labels must lie in \[0, 4\), got \[0, 4\]"),
        (torch.tensor([0, 1]), torch.tensor([0, -1]), r"labels must lie in \[0, 4\), got \[-1, 0\]"),
        (torch.tensor([0.0]), torch.tensor([0]), r"ids must be integers \[N\], got float32 \[1\]"),
        (torch.tensor([0]), torch.tensor([[0, 1]]), r"labels must be integers \[N\], got int64 \[1, 2\]"),
    ],
)
def test_bad_ids_and_labels_are_named(unet, ids, labels, text):
    with pytest.raises(UserError, match="Sampler: " + text):
        make_sampler(unet)(ids, labels)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"micro_batch": 0}, "micro_batch must be an integer, at least 1, got 0"),
        ({"noise_scale": 0.0}, "noise_scale must be above 0"),
        ({"noise_scale": float("nan")}, "noise_scale must be above 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite or None"),
        ({"seed": -1}, "seed must be an integer, at least 0 and at most 9223372036854775807, got -1"),
        ({"crop": (9, 8)}, "crop must lie inside"),
        ({"crop": (0, 8)}, "crop must be an integer, at least 1, got 0"),
        ({"steps": 0}, "num_inference_steps must be an integer, at least 1 and at most 10000, got 0"),
    ],
)
def test_bad_options_are_named(unet, options, text):
    with pytest.raises(UserError, match=text):
        make_sampler(unet, **options)


def test_guidance_needs_a_null_class_and_a_callable_needs_a_shape():
    with pytest.raises(UserError, match="unet must have class embeddings"):
        make_sampler(make_unet(embeddings=None), guidance_scale=2.0)
    with pytest.raises(UserError, match="image_shape must be given"):
        make_sampler(lambda x, t, class_labels: x)


def test_repeated_ids_of_a_stream_are_named(unet):
    ids = list(range(8)) + [3]  # the copy is in another batch
    with pytest.raises(UserError, match="ids must not repeat, got 1 repeated"):
        list(make_sampler(unet, micro_batch=8).stream(LabelPlan.balanced(2), ids))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "scheduler", [diffusers.DDIMScheduler(), diffusers.DDPMScheduler()]
)  # both clip; DDPM hides inf
def test_non_finite_output_names_step_and_ids(value, scheduler):
    calls = []

    def network(x, t, class_labels):
        calls.append(t)
        out = 0.1 * x.clone()
        if t == scheduler.timesteps[2]:
            out[class_labels == 1, 0, 1, 1] = value
        return out

    scheduler.set_timesteps(4)
    sampler = make_sampler(network, scheduler, 4, image_shape=(1, 4, 4))
    ids = torch.arange(10, 16)
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    with pytest.raises(UserError, match=r"finite values, got NaN or inf for ids in \[11, 14\], first at step 2"):
        sampler(ids, labels)
    assert sampler(ids, torch.zeros_like(labels)).shape == (6, 4, 4, 1)


def test_output_of_another_shape_is_named():
    sampler = make_sampler(lambda x, t, class_labels: x[:, :1], image_shape=(3, 4, 4))
    with pytest.raises(UserError, match=r"unet must return \[8, 3, 4, 4\].*got \[8, 1, 4, 4\]"):
        sampler(torch.arange(2), torch.zeros(2, dtype=torch.int64))


def test_describe_tells_samplers_apart(unet):
    """Whatever changes the images changes the description, and nothing else does."""
    base = make_sampler(unet).describe()
    assert base == make_sampler(unet).describe()
    assert json.loads(json.dumps(base)) == base  # plain values, as a manifest needs them
    others = [
        make_sampler(unet, steps=4),
        make_sampler(unet, seed=8),
        make_sampler(unet, micro_batch=4),
        make_sampler(unet, guidance_scale=2.0),
        make_sampler(unet, noise_scale=1.1),
        make_sampler(unet, crop=(7, 8)),
        make_sampler(unet, eta=0.5),
        make_sampler(unet, diffusers.DDIMScheduler()),
        make_sampler(make_unet(seed=1)),
    ]
    result = [sampler.describe() for sampler in others]
    assert all(each != base for each in result)
    changed = {key for each in result for key in base if each[key] != base[key]}
    assert changed >= {"steps", "step_table", "network", "seed", "micro_batch", "guidance_scale", "noise_scale", "crop"}
