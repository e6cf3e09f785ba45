"""Options and files of ``kr-fast synthesize`` and ``kr-fast bench``: refused in one line, with nothing left behind."""

import dataclasses
import json
import math
import typing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kr_fast.benchmarks.config import BenchConfig
from kr_fast.cli import main
from kr_fast.runtime.errors import UserError
from kr_fast.synthesis.job import SynthesizeConfig

NUMBERS = [
    (config, field.name)
    for config in (SynthesizeConfig, BenchConfig)
    for field in dataclasses.fields(config)
    if typing.get_type_hints(config)[field.name] in (int, float)
]


@pytest.mark.parametrize(("config", "name"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**30])
def test_every_number_has_a_finite_range(config, name, value):
    where = {SynthesizeConfig: "synthesize", BenchConfig: "bench"}[config]
    if typing.get_type_hints(config)[name] is float and value == 10**30:
        return
    with pytest.raises(UserError, match=f"{where}: {name} must"):
        config(**{name: value})


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_zero_is_refused_where_it_means_nothing(config, name):
    if name in ("micro_batch", "shard_size", "steps", "batch", "repeats"):
        with pytest.raises(UserError, match=f"{name} must"):
            config(**{name: 0})
    else:
        config(**{name: 0})


def test_ids_end_below_two_to_the_63():
    with pytest.raises(UserError, match="synthesize: first_id must be at most 9223372036854775807 less count"):
        SynthesizeConfig(first_id=2**63 - 1, count=1)


def small_unet(size, levels, **options):
    """A ``UNet2DModel`` without attention, of ``levels`` resolutions of 8 channels."""
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    shape = {"sample_size": size, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,) * levels}
    return diffusers.UNet2DModel(
        **shape, **blocks, layers_per_block=1, norm_num_groups=4, add_attention=False, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of ten class embeddings, and a scheduler."""
    import diffusers

    path = tmp_path_factory.mktemp("models") / "ten"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = small_unet(8, 1, num_class_embeds=10)
    unet.save_pretrained(path / "unet")
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-3).save_pretrained(path / "scheduler")
    return path


def refused(tmp_path, capsys, model, *flags):
    out = tmp_path / "data"
    given = ["--count", 8, "--micro-batch", 8, "--num-inference-steps", 1, *flags]
    code = main(["synthesize", "--model", str(model), "--out", str(out), *map(str, given)])
    shown = capsys.readouterr()
    assert (code, shown.out, out.exists()) == (2, "", False)
    return shown.err.strip().splitlines()[-1]


def copied(tmp_path, folder, change=None, **config):
    """The folder with other weights or another configuration."""
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    if change is not None:
        save_file(change(load_file(weights)), weights)
    if config:
        file = path / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def test_class_counts_with_guidance_are_asked(tmp_path, folder, capsys):
    line = refused(tmp_path, capsys, folder, "--guidance-scale", 2)
    assert "synthesize: num_classes must be given with guidance: 9 if the last of the 10 class embeddings of" in line
    line = refused(tmp_path, capsys, folder, "--guidance-scale", 2, "--num-classes", 10)
    assert "Sampler: unet must have a null class beside its 10 classes for guidance, got 10 class embeddings" in line
    line = refused(tmp_path, capsys, folder, "--num-classes", 11)
    assert "Sampler: num_classes must be at most the network's 10 class embeddings, got 11" in line
    line = refused(tmp_path, capsys, folder, "--num-classes", 9, "--labels", "counts:" + ",".join(["1"] * 10))
    assert "synthesize: labels must be below the model's 9 classes, got 9" in line
    command = [
        "synthesize",
        "--model",
        str(folder),
        "--count",
        "20",
        "--micro-batch",
        "20",
        "--num-inference-steps",
        "1",
    ]
    for flags, last in ((["--num-classes", "9", "--guidance-scale", "2"], 8), ([], 9)):
        out = tmp_path / str(last)
        assert main([*command, *flags, "--out", str(out)]) == 0
        assert np.load(out / "shard-000000.labels.npy").max() == last


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()},
            [
                "no others, got class_embedding.weight, conv_in.bias, conv_in.weight and",
                "_orig_mod.class_embedding.weight",
                "(saved from a compiled module: save its _orig_mod)",
            ],
        ),
        (
            lambda tensors: {name: value for name, value in tensors.items() if name != "conv_in.bias"},
            ["hold the weights of its UNet2DModel and no others, got conv_in.bias missing in"],
        ),
        (lambda tensors: tensors | {"more.weight": torch.zeros(2)}, ["and no others, got more.weight unexpected in"]),
        (lambda tensors: tensors | {"conv_in.bias": torch.zeros(3)}, ["must hold readable weights, got"]),
    ],
)
def test_weights_that_do_not_fit(tmp_path, folder, capsys, change, words):
    line = refused(tmp_path, capsys, copied(tmp_path, folder, change))
    assert "synthesize: model must hold" in line
    for each in words:
        assert each in line


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"block_out_channels": "wide"}, "synthesize: model must hold readable weights, got"),
        ({"norm_num_groups": 3}, "synthesize: model must hold readable weights, got"),
        ({"_class_name": 3}, "synthesize: model must hold a configuration of diffusers, got"),
        ({"class_embed_type": "identity", "num_class_embeds": None}, "synthesize: model must hold the weights of its"),
        ({"sample_size": None}, "Sampler: image_shape must be given for a network without config.sample_size"),
        ({"sample_size": "large"}, "Sampler: unet must have one or two integers as config.sample_size, got 'large'"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, folder, capsys, config, words):
    assert words in refused(tmp_path, capsys, copied(tmp_path, folder, **config))


def test_a_scheduler_that_does_not_take_its_configuration(tmp_path, folder, capsys):
    path = copied(tmp_path, folder)
    (path / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDIMScheduler", "beta_schedule": "steep", "num_train_timesteps": 10}'
    )
    line = refused(tmp_path, capsys, path)
    assert "synthesize: scheduler must take the configuration of" in line
    assert "steep is not implemented" in line


def test_parts_of_a_pipeline_that_would_be_left_out(tmp_path, folder, capsys):
    path = copied(tmp_path, folder)
    index = {
        "_class_name": "LDMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "id2label": {"0": "a"},
    }
    (path / "model_index.json").write_text(json.dumps(index))
    line = refused(tmp_path, capsys, path)
    assert "synthesize: model must be made of unet, transformer, vae, scheduler alone, got vqvae in LDMPipeline" in line


def test_a_size_that_does_not_pass_through_the_levels(tmp_path, capsys):

    unet = small_unet(28, 4)
    unet.save_pretrained(tmp_path / "unet")
    line = refused(tmp_path, capsys, tmp_path / "unet", "--scheduler", "DDIMScheduler")
    assert "Sampler: image_shape must be a multiple of 8: the network has 4 levels, got 28 px" in line


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([0.0, 1.0]), "synthesize: labels must be integers [N], got float64 [2]"),
        (np.array([[0, 1], [1, 0]]), "synthesize: labels must be integers [N], got int64 [2, 2]"),
        (np.array([0, -1]), "synthesize: labels must be at least 0, got [-1, 0]"),
        (np.array([0, 10]), "synthesize: labels must be below the model's 10 classes, got 10"),
        (np.array([], np.int64), "labels must hold at least one label"),
        (np.array(["a"]), "synthesize: labels must be"),
        (b"", "synthesize: labels must be a readable .npy file, got"),
        (b"PK\x03\x04", "synthesize: labels must be a readable .npy file, got"),
    ],
)
def test_files_of_labels_that_do_not_fit(tmp_path, folder, capsys, values, words):
    path = tmp_path / "labels.npy"
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        np.save(path, values)
    assert words in refused(tmp_path, capsys, folder, "--labels", path, "--count", 0)


@pytest.mark.parametrize("values", [np.array([[3], [1], [4]], ">i4"), np.array([3, 1, 4], np.uint8)])
def test_files_of_labels_of_any_integer_dtype(tmp_path, folder, values):
    np.save(tmp_path / "labels.npy", values)
    flags = [
        "--count",
        "0",
        "--labels",
        str(tmp_path / "labels.npy"),
        "--num-inference-steps",
        "1",
        "--micro-batch",
        "4",
    ]
    assert main(["synthesize", "--model", str(folder), "--out", str(tmp_path / "out"), *flags]) == 0
    assert np.load(tmp_path / "out" / "shard-000000.labels.npy").tolist() == [3, 1, 4]
