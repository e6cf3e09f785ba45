"""A generator of the user's in place of a trained one: a network, ready images or a function."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from toy_runs import context_of, new_context

import kr_fast
from kr_fast import data
from kr_fast.recycling import given, preflight
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.sampling import default_sampling, tuned_sampling
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import Journal

CPU = torch.device("cpu")
GAN = """
import torch
def draw(labels, ids, seed):
    at = torch.arange(64, device=labels.device).float().view(1, 1, 8, 8)
    return torch.sin(labels.float().view(-1, 1, 1, 1) + at * (1 + ids.float().view(-1, 1, 1, 1) % 7) + seed % 5)
def chance(labels): return torch.randint(0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8)
def large(labels): return torch.full((len(labels), 1, 8, 8), 255.0)
def nothing(labels): return torch.full((len(labels), 1, 8, 8), float("nan"))
def flat(labels): return torch.zeros(len(labels), 64)
def bright(labels): return torch.arange(64).view(1, 1, 8, 8).expand(len(labels), -1, -1, -1) / 63
buffer = torch.empty(64, 1, 8, 8, dtype=torch.uint8)
def reusing(labels, ids):
    buffer[: len(ids)] = ids.view(-1, 1, 1, 1)
    labels.zero_(), ids.zero_()
    return buffer[: len(ids)]
def broken(labels): raise KeyError("no weights")
value = 3
"""


@pytest.fixture
def gan(tmp_path, monkeypatch):
    (tmp_path / "user_gan.py").write_text(GAN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_gan"
    sys.modules.pop("user_gan", None)


def ready(path, counts, names=("0", "1")):
    """A folder of images whose pixels say which they are: row k of class c has the values c and k."""
    from PIL import Image

    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        (path / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((8, 8), 255, np.uint8)
            pixels[:2], pixels[2:4], pixels[4:6] = label, index, 0
            Image.fromarray(pixels).save(path / name / f"{index:03d}.png")
    return path


def network(path, *, classes=2, null=True, scheduler=True, side=8, channels=1, conditional=True):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    torch.manual_seed(0)
    made = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes + null if conditional else None,
        norm_num_groups=4,
    )
    made.save_pretrained(path / "unet")
    if scheduler:
        FlowMatchEulerDiscreteScheduler().save_pretrained(path / "scheduler")
    return path


def context(tmp_path, generator, **options):
    made = new_context(tmp_path, counts=(40, 10, 10), generator=str(generator), **options)
    config = given.applied(made.config, made.data, CPU)
    return Context(config, made.out, made.runtime, made.data, made.journal)


def drawn(made, count=20, period=0):
    return gkd.drawn(made, default_sampling(made, 0), count)(period)


def test_ready_images_are_drawn_without_replacement_in_a_period(tmp_path):
    made = context(tmp_path, ready(tmp_path / "images", (30, 12)))
    first, second, again = (drawn(made, 20, period) for period in (0, 1, 0))
    for ids, labels, images in (first, second):
        assert labels.tolist() == [0, 1] * 10  # as frequent as in the training split
        assert len(ids.unique()) == 20
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        assert torch.equal(images[:, 2, 0, 0].long() + 30 * labels, ids)  # an id is the number of an image
    other_seed = gkd.drawn(made, default_sampling(made, 0), 20, seed=made.config.seed + 1)(0)
    assert set(first[0].tolist()) not in (set(second[0].tolist()), set(other_seed[0].tolist()))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any("than a period" in note for note in given.check(context(tmp_path, tmp_path / "images", images=24)))


def test_images_of_a_class_that_are_too_few_are_repeated_evenly_and_noted(tmp_path):
    made = context(tmp_path, ready(tmp_path / "images", (40, 4)), images=64)
    assert any("a period of 64" in note and "1 of 2 classes (4 for 32" in note for note in given.check(made))
    ids, labels, _ = drawn(made, 64)
    assert ids[labels == 1].bincount()[40:].tolist() == [8] * 4
    assert len(ids[labels == 0].unique()) == 32


def test_classes_of_a_folder_go_by_name(tmp_path):
    """The data's are in another order than the folder's."""
    made = new_context(tmp_path, counts=(40, 10, 10), generator=str(ready(tmp_path / "i", (9, 9), ("a", "b"))))
    object.__setattr__(made.data, "class_names", ("b", "a"))
    _, labels, images = drawn(made, 8)
    assert torch.equal(images[:, 0, 0, 0].long(), 1 - labels)


def test_npz_of_ready_images(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 2
    for name, keys in (("own", ("images", "labels")), ("adm", ("arr_0", "arr_1"))):
        np.savez(tmp_path / f"{name}.npz", **dict(zip(keys, (images, labels), strict=True)))
        ids, classes, pixels = drawn(context(tmp_path, tmp_path / f"{name}.npz"), 10)
        assert np.array_equal(pixels[..., 0].numpy(), images[ids])
        assert np.array_equal(classes.numpy(), labels[ids])


def test_a_function_draws_by_label_id_and_seed(tmp_path, gan):
    made = context(tmp_path, f"{gan}:draw", micro_batch=7)
    ids, labels, images = drawn(made, 20, 1)
    assert ids.tolist() == list(range(20, 40))
    module = sys.modules[gan]
    seed = given.opened(made.config, made.data, CPU).draw(None, made.label_plan(), 1, made.config.seed, None).seed
    expected = module.draw(labels, ids=ids, seed=seed).double().add(1).mul(127.5).round()
    assert torch.equal(images[..., 0].double(), expected[:, 0])
    assert not any("same images again" in note for note in given.check(made))
    assert any("same images again" in note for note in given.check(context(tmp_path, f"{gan}:chance")))


def test_a_function_may_reuse_its_memory_and_change_what_it_is_given(tmp_path, gan):
    ids, labels, images = drawn(context(tmp_path, f"{gan}:reusing", micro_batch=8))
    assert ids.tolist() == list(range(20))
    assert sorted(set(labels.tolist())) == [0, 1]
    assert images[:, 0, 0, 0].tolist() == ids.tolist()


def test_floats_that_may_be_of_another_range_are_noted(tmp_path, gan):
    run = context(tmp_path, f"{gan}:bright")
    note = [each for each in given.check(run) if "without a value below 0" in each]
    assert note == [
        "the given function, whose floats are read as black at -1 and white at 1, drew 16 images without a value "
        "below 0 (are they of [0, 1]?)"
    ]
    assert not any("without a value" in each for each in given.check(context(tmp_path, f"{gan}:draw")))


def test_a_network_draws_as_the_generator_of_a_run(tmp_path, finished):
    """A run's checkpoint as a folder of diffusers, and the folder of the run: the same images, byte for byte."""
    out = finished[0]
    run = context_of(out)
    sampling = default_sampling(run, tuned_sampling(run).checkpoint)
    expected = gkd.drawn(run, sampling, 16)(3)
    for source in (out, run.folder.generator(sampling.checkpoint)):
        config = type(run.config)(**{**vars(run.config), "generator": (str(source),)})
        made = Context(given.applied(config, run.data, CPU), tmp_path, run.runtime, run.data, run.journal)
        assert made.config.tune_guidance_scale == run.config.tune_guidance_scale  # it has a null class
        assert all(torch.equal(*pair) for pair in zip(drawn(made, 16, 3), expected, strict=True))


def test_the_generator_of_a_run_on_other_images_or_classes(tmp_path, finished):
    """With another seed the digits are split otherwise: its generator has seen test images of the new run."""
    run, words = context_of(finished[0]), "it may have been trained on validation and test images of this run"
    for seed, noted in ((run.config.seed, False), (run.config.seed + 1, True)):
        config = dataclasses.replace(run.config, generator=(str(finished[0]),))
        cut = data.load("digits", seed=seed, val_fraction=config.val_fraction, test_fraction=config.test_fraction)
        made = Context(config, tmp_path, run.runtime, cut, Journal(tmp_path))
        assert any(words in note for note in given.check(made)) == noted
    made.data = dataclasses.replace(cut, class_names=tuple(reversed(cut.class_names)))
    with pytest.raises(UserError, match="generator must be a run with the classes 9, 8, .*, got 0, 1"):
        given.check(made)


def test_a_network_without_a_null_class_is_not_guided(tmp_path):
    made = context(tmp_path, network(tmp_path / "model", null=False), tune_guidance_interval=(0.0, 0.5))
    assert made.config.tune_guidance_scale == made.config.tune_guidance_interval == ()
    assert drawn(made, 6)[2].shape == (6, 8, 8, 1)
    with pytest.raises(UserError, match="guidance_scale must be 1 with a generator that has no null class"):
        context(tmp_path, tmp_path / "model", guidance_scale=2.0)


REFUSED = {
    "missing": (lambda p: p / "none", "generator must be the folder of a run .* which is not there"),
    "classes": (lambda p: network(p / "m", classes=5), "generator must have the data's 2 classes, or 3 .* got 6"),
    "unconditional": (lambda p: network(p / "m", conditional=False), "generator must be conditional on the data's 2"),
    "no scheduler": (lambda p: network(p / "m", scheduler=False), "run: generator must hold a scheduler"),
    "side": (lambda p: network(p / "m", side=16), "draw images of the data's 8 x 8 px in 1 channel, got 16 x 16"),
    "channels": (lambda p: network(p / "m", channels=3), "in 1 channel, got 8 x 8 px in 3 channels"),
    "class names": (lambda p: ready(p / "i", (3, 3), ("a", "b")), "generator must have a folder for each class, 0, 1"),
    "no folder of images": (lambda p: p, "^run: generator must be the folder of a run .* got .* no folder$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_data_is_refused(tmp_path, case):
    make, words = REFUSED[case]
    with pytest.raises((UserError, FileNotFoundError), match=words):
        context(tmp_path / "run", make(tmp_path))


FUNCTIONS = {
    "large": r"run: generator must return floats in \[-1, 1\], or uint8, got \[255, 255\]",
    "nothing": r"floats in \[-1, 1\]",
    "flat": r"return uint8 or float \[16, 1, 8, 8\] for 16 labels, got float32 \[16, 64\]",
    "broken": "draw images of 16 labels, got the error KeyError: 'no weights'",
    "value": "name a function of labels that returns images",
    "absent": "name an importable pkg.mod:function",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_fails_is_refused(tmp_path, gan, name):
    with pytest.raises(UserError, match=FUNCTIONS[name]):
        context(tmp_path, f"{gan}:{name}")


def test_npz_that_lacks_a_class_or_its_keys_is_refused(tmp_path):
    pixels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "one.npz", images=pixels, labels=np.zeros(4, int))
    np.savez(tmp_path / "keys.npz", train_images=np.zeros((4, 8, 8), np.uint8))
    for name, words in (("one", "hold an image of every class of the training split, got none of 1"), ("keys", "keys")):
        with pytest.raises(UserError, match=f"generator must .*{words}"):
            context(tmp_path, tmp_path / f"{name}.npz")


def test_options_that_a_given_generator_cannot_have(tmp_path):
    for options, words in (({"budget": "1h"}, "budget must be left out"), ({"audit_generator": "retrained"}, "shared")):
        with pytest.raises(UserError, match=words):
            new_context(tmp_path, generator="images", **options)


def test_a_run_of_ready_images(tmp_path, caplog):
    """The whole pipeline on few images, and what it says of them; afterwards other images are refused."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (128, 8, 8, 1), np.uint8), np.arange(128) % 2
    parts = {"train": slice(60), "val": slice(60, 80), "test": slice(80, 120)}
    split = {
        f"{name}_{what}": of[part]
        for name, part in parts.items()
        for what, of in (("images", pixels), ("labels", labels))
    }
    np.savez(tmp_path / "data.npz", **split)
    images = random.integers(0, 256, (128, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "ready.npz", images=images, labels=labels)
    options = {"generator": str(tmp_path / "ready.npz"), "out": str(tmp_path / "run"), "images": 64, "periods": 2}
    options |= {"data": str(tmp_path / "data.npz"), "teacher_epochs": 1, "audit_released": False}
    with caplog.at_level("WARNING", logger="kr_fast"):
        result = kr_fast.recycle(RecycleConfig(**{**preset("toy"), **options})).metrics
    assert [row["step"] for row in result["checkpoints"]] == [0]
    assert {row["num_inference_steps"] for row in result["tuning"]} == {1}
    assert len(result["tuning"]) == 2  # of the confidence alone
    assert "generator" not in result["audit"]  # there is no attack on weights
    assert result["memorisation"]["compared"] == 20
    assert [row["step"] for row in result["memorisation"]["rows"]] == [0]
    report = (tmp_path / "run" / "release" / "report.md").read_text()
    assert "the generator was given, 128 ready images" in report
    assert "What the generator memorised" in report
    assert "128 ready images" in caplog.text
    drawn = np.load(tmp_path / "run" / "release" / "synthetic" / "images.npy")
    ids = np.load(tmp_path / "run" / "private" / "synthetic" / "ids.npy")
    assert np.array_equal(drawn, images[ids])
    options = {"generator": str(tmp_path / "run"), "out": str(tmp_path / "second")}
    with pytest.raises(UserError, match="must be a run that trained its generator, got .* was given"):
        kr_fast.recycle(RecycleConfig(**{**preset("toy"), **options}))
    journal = files.read_json(tmp_path / "run" / "journal.json")
    del journal["report"]
    files.write_json(tmp_path / "run" / "journal.json", journal)
    np.savez(tmp_path / "ready.npz", images=images[::-1], labels=labels[::-1])
    config = context_of(tmp_path / "run").config
    with pytest.raises(UserError, match="generator must be the one that the run in .* was started with"):
        kr_fast.recycle(config)
    (tmp_path / "run" / "private" / "generator" / "given.json").write_text("{}")
    with pytest.raises(UserError, match="given.json must be as the stage generator left it, got 2 bytes in place of"):
        kr_fast.recycle(config)


def test_settings_that_a_network_s_scheduler_cannot_draw_by_are_refused_first(tmp_path):
    from diffusers import FlowMatchHeunDiscreteScheduler

    made = network(tmp_path / "model", scheduler=False)
    FlowMatchHeunDiscreteScheduler().save_pretrained(made / "scheduler")
    options = {"guidance_scale": 2.0, "num_inference_steps": 10, "tune_num_inference_steps": ()}
    run = context(tmp_path, made, guidance_interval=(0.5, 0.52), **options)
    with pytest.raises(UserError, match="guidance_interval must hold one of the 19 solver steps"):
        preflight.check(run)
    preflight.check(context(tmp_path, made, guidance_interval=(0.5, 0.53), **options))


def test_several_generators_share_each_period(tmp_path, gan):
    """11 images: 4, 4 and 3, each part as its generator alone draws it, of ids that no other image has."""
    images = ready(tmp_path / "images", (30, 12))
    sources = (str(images), f"{gan}:draw", str(images))
    made = new_context(tmp_path, counts=(40, 10, 10), generator=sources)
    made = Context(given.applied(made.config, made.data, CPU), made.out, made.runtime, made.data, made.journal)
    ids, labels, pixels = drawn(made, 11, 1)
    assert len(ids.unique()) == 11
    assert torch.equal(pixels[:4, 0, 0, 0].long(), labels[:4])
    assert torch.equal(pixels[:4, 2, 0, 0].long() + 30 * labels[:4], ids[:4] // 3)
    alone = drawn(context(tmp_path, images), 4, 1)
    assert torch.equal(ids[:4] // 3, alone[0])
    function = sys.modules[gan].draw
    seed = given.opened(made.config, made.data, CPU).draw(None, made.label_plan(), 11, 0, None).draws[1].seed
    expected = function(labels[4:8], ids[4:8] // 3, seed).double().add(1).mul(127.5).round()
    assert (ids[4:8] // 3).tolist() == [4, 5, 6, 7]
    assert torch.equal(pixels[4:8, ..., 0].double(), expected[:, 0])
    assert set((ids[8:] // 3).tolist()) != set((ids[:3] // 3).tolist())  # the same images, another seed
    assert any("each of the 3 draws" in note for note in given.check(made))
    assert made.config.num_inference_steps == 1  # none is a network


def test_guidance_of_several_needs_a_null_class_in_each_network(tmp_path):
    networks = [network(tmp_path / name, null=name == "a") for name in ("a", "b")]
    made = new_context(tmp_path, generator=(str(networks[0]), str(ready(tmp_path / "images", (3, 3)))))
    assert given.opened(made.config, made.data, CPU).guided is True
    made = new_context(tmp_path, generator=tuple(map(str, networks)))
    assert given.opened(made.config, made.data, CPU).guided is False
    assert drawn(made, 5)[2].shape == (5, 8, 8, 1)
