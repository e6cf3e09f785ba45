"""Augmentation that the generator is told of, dropout, and batches of balanced classes: in training alone."""

import copy
import dataclasses

import pytest
import torch
from toy_runs import new_context

from kr_fast.data import to_float
from kr_fast.models import unet
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.preflight.networks import make_generator
from kr_fast.recycling.stages.generation import augmentation, generator, generator_loss
from kr_fast.recycling.stages.generation.generator_loss import batch_loss
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis.optimized.optimize import optimize

AUGMENTED = {"generator_augment": 0.5, "generator_shift": 2, "generator_rotate": 30.0, "generator_scale": 0.2}


def network(classes=2):
    torch.manual_seed(0)
    return unet(8, 8, 1, classes, widths=(16, 16))  # in groups of one channel a shift would vanish


def test_an_image_is_turned_by_what_the_network_is_told():
    config = RecycleConfig(**AUGMENTED)
    told, matrix = augmentation.draw(config, 4000, (8, 16), seeds.generator(0, "test"))
    for told_of, count in ((told[:, 0], 4000), (told[:, 1], 4000), (told[:, 2], 4000)):
        assert abs(float((told_of != 0).double().mean()) - 0.5) < 4 * (0.25 / count) ** 0.5
        assert float(told_of.abs().max()) <= 1
    assert torch.equal(told[:, 2] != 0, told[:, 3] != 0)  # one shift, along both axes
    angle, scale = told[:, 0].double() * torch.pi / 6, 1 + 0.2 * told[:, 1].double()
    # The grid's positions are in halves of a side: a turn by pixels has the sides' ratio beside its sine.
    expected = torch.stack([scale * angle.cos(), -scale * angle.sin() / 2, 2 * told[:, 2].double() * 2 / 16], 1)
    torch.testing.assert_close(matrix[:, 0].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix[:, 1, 0].double(), 2 * scale * angle.sin(), rtol=0, atol=1e-6)
    spared = ~told.any(1)
    assert 0.08 < float(spared.double().mean()) < 0.17  # an eighth
    assert torch.equal(matrix[spared], torch.eye(2, 3).expand(int(spared.sum()), 2, 3))


def test_nothing_is_told_of_a_change_without_range():
    config = RecycleConfig(generator_augment=1.0, generator_shift=0, generator_rotate=0.0, generator_scale=0.3)
    told, _ = augmentation.draw(config, 10, (8, 8), seeds.generator(0, "test"))
    assert told[:, 1].all()
    assert not told[:, [0, 2, 3]].any()
    with pytest.raises(UserError, match="generator_augment must be 0 unless"):
        dataclasses.replace(config, generator_scale=0.0)


@pytest.mark.parametrize("optimized", [False, True])
def test_the_map_vanishes_for_an_image_as_it_is(optimized):
    """Before training and for zeros the network is the plain one; trained weights alone make a difference."""
    plain = network()
    told = copy.deepcopy(plain)
    augmentation.condition(told, RecycleConfig(**AUGMENTED))
    if optimized:
        patched = [optimize(each, training=True).patched for each in (plain, told)]
        assert patched[0] == patched[1]
    x, time, labels = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0]), torch.tensor([0, 1, 2])
    expected = plain(x, time, class_labels=labels).sample
    told.class_embedding.told = torch.rand(3, 4)
    assert torch.equal(told(x, time, class_labels=labels).sample, expected)
    torch.nn.init.normal_(told.class_embedding.augmentation.weight)
    assert not torch.allclose(told(x, time, class_labels=labels).sample, expected, atol=1e-3)
    told.class_embedding.told = torch.zeros(3, 4)
    assert torch.equal(told(x, time, class_labels=labels).sample, expected)


def test_a_batch_does_not_depend_on_the_number_of_ranks(tmp_path):
    context = new_context(tmp_path, **AUGMENTED, generator_classes="balanced")
    images, labels = context.data.train.images, context.data.train.labels
    model = network()
    augmentation.condition(model, context.config)
    torch.nn.init.normal_(model.class_embedding.augmentation.weight)
    count = context.config.generator_batch_size
    whole, *parts = (
        float(batch_loss(context, model, images, labels, 3, 0, share).detach().double())
        for share in (torch.arange(count), torch.arange(0, count, 2), torch.arange(1, count, 2))
    )
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)
    config = dataclasses.replace(context.config, generator_augment=0.0)
    spared = batch_loss(
        dataclasses.replace(context, config=config), network(), images, labels, 3, 0, torch.arange(count)
    )
    assert whole != pytest.approx(float(spared.detach()), rel=1e-3)


def test_a_batch_of_which_no_image_is_augmented(tmp_path):
    """Its loss is that without augmentation."""
    context = new_context(tmp_path, **{**AUGMENTED, "generator_augment": 1e-9})
    images, labels = context.data.train.images, context.data.train.labels
    model = network()
    augmentation.condition(model, context.config)
    share = torch.arange(context.config.generator_batch_size)
    plain = dataclasses.replace(context, config=dataclasses.replace(context.config, generator_augment=0.0))
    losses = [batch_loss(*each, images, labels, 3, 0, share) for each in ((context, model), (plain, network()))]
    assert torch.equal(*losses)


def test_mirrored_images_are_padded_where_the_sampler_crops(tmp_path, monkeypatch):
    """7 pixels that two resolutions need 8 of: without the padding every image is one of the data or its mirror."""
    context, seen = new_context(tmp_path, side=7, generator_flip=True), []
    noised = generator_loss.noised
    monkeypatch.setattr(generator_loss, "noised", lambda c, x, *rest: seen.append(x) or noised(c, x, *rest))
    images, labels = context.data.train.images, context.data.train.labels
    batch_loss(context, network(), images, labels, 0, 0, torch.arange(context.config.generator_batch_size))
    real = to_float(images)
    drawn = seen[0][:, None, :, :7, :7]
    plain, mirrored = ((drawn == each).flatten(2).all(2).any(1) for each in (real, real.flip(3)))
    assert bool((plain | mirrored).all())
    assert bool(plain.any())
    assert bool(mirrored.any())
    assert torch.equal(seen[0][..., 7], seen[0][..., 5])  # by reflection, as at the bottom


def test_balanced_batches_draw_every_class_alike():
    """Classes of 90, 9 and 1 images, and one of which there is none, as in a shadow's half."""
    labels = torch.tensor([0] * 90 + [3] * 9 + [1])[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    config = RecycleConfig(generator_classes="balanced")
    index = augmentation.batch_index(config, labels, 9000, seeds.generator(0, "test"))
    counts = torch.bincount(labels[index], minlength=4)
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 3000).abs().max() < 4 * (9000 * 2 / 9) ** 0.5
    assert len(index.unique()) == 100  # every image


def test_training_goes_on_where_it_was_and_leaves_a_plain_network(tmp_path, monkeypatch):
    from diffusers import UNet2DModel

    monkeypatch.setattr(generator, "LOG_EVERY", 5)
    weights, curves = [], []
    for name, ends in (("whole", [[12]]), ("stopped", [[7], [12]])):
        context = new_context(tmp_path / name, counts=(40, 10, 10), **AUGMENTED, generator_classes="balanced")
        for saved in ends:
            result = generator.train(
                context,
                context.data.train,
                saved,
                context.folder.generator,
                seed=0,
                state_path=context.folder.state / "generator.pt",
                single_process=True,
                keep_state=True,
            )
        path = context.folder.generator(12) / "unet"
        weights.append(files.load_tensors(path / generator.WEIGHTS))
        loaded, info = UNet2DModel.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert result["parameters"] == sum(value.numel() for value in loaded.parameters())
        assert generator.validation_loss(context, context.folder.generator(12)) > 0
        curves.append(result["curves"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert [each["step"] for each in curves] == [[5, 10, 12], [5, 7, 10, 12]]
    (five, ten, _), (_, seven, after, _) = (each["loss"] for each in curves)
    assert five == curves[1]["loss"][0]
    assert 5 * ten == pytest.approx(2 * seven + 3 * after, rel=1e-6)  # means of the steps since the last point


def test_dropout_is_a_function_of_seed_step_and_rank(tmp_path):
    """Optimized as not, where masks lie in the same layout; in training alone; torch's own generator is put back."""
    context = new_context(tmp_path, generator_dropout=0.5, generator_widths=(16, 16))
    images, labels = context.data.train.images, context.data.train.labels
    share = torch.arange(0, context.config.generator_batch_size, 2)

    def losses(model, *calls):
        return [float(batch_loss(context, model, images, labels, *call).detach()) for call in calls]

    torch.manual_seed(0)
    model = make_generator(context).train().to(memory_format=torch.channels_last)
    before = torch.get_rng_state()
    first, again, step, seed, rank = losses(
        model, (3, 0, share), (3, 0, share), (4, 0, share), (3, 1, share), (3, 0, share + 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert len({first, step, seed, rank}) == 4
    kept = losses(model.eval(), (3, 0, share))[0]
    assert kept != pytest.approx(first, rel=1e-3)
    optimize(model.train(), training=True)
    assert losses(model, (3, 0, share))[0] == pytest.approx(first, rel=1e-4)
    assert losses(model, (3, 0, share)) == losses(model, (3, 0, share))
    path = tmp_path / "unet"
    model.save_config(path)
    assert files.read_json(path / "config.json")["dropout"] == 0.5
