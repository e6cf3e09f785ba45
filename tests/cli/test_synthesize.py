"""kr-fast synthesize from diffusers' folders: what is written, resume, and bad input as one line without a trace."""

import json

import numpy as np
import pytest
import torch
import yaml

import kr_fast
from kr_fast.cli import main

FLAGS = ["--count", "40", "--shard-size", "16", "--micro-batch", "8", "--num-inference-steps", "2"]


pytestmark = pytest.mark.usefixtures("no_progress")


@pytest.fixture(scope="module")
def network():
    from kr_fast.models import unet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unet(8, 8, 1, 10, widths=(8, 8))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, network):
    """A pipeline's folder: model_index.json, unet, scheduler."""
    from diffusers import DDIMScheduler, DDPMPipeline

    folder = tmp_path_factory.mktemp("models") / "pipeline"
    DDPMPipeline(network, DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


def images(out, kind="images"):
    return np.concatenate([np.load(path) for path in sorted(out.glob(f"*.{kind}.npy"))])


def refused(capsys, *arguments):
    """The line that a refused command ends with."""
    code = main(["synthesize", *map(str, arguments)])
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    return shown.err.strip().splitlines()[-1]  # diffusers may have said something of its own before


def test_pipeline_folder(tmp_path, pipeline, network, capsys):
    """The images are the sampler's, the configuration lies beside them, and the same command has nothing left to do."""
    from diffusers import DDIMScheduler

    out = tmp_path / "data"
    command = ["synthesize", "--model", str(pipeline), "--out", str(out), *FLAGS, "--guidance-scale", "1.5"]
    command += ["--num-classes", "10"]
    assert main(command) == 0
    assert "40 images in 3 shards, 40 here at" in capsys.readouterr().out
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    sampler = kr_fast.Sampler(network.eval(), scheduler, 2, seed=0, guidance_scale=1.5, num_classes=10, micro_batch=8)
    ids = torch.arange(40)
    assert np.array_equal(images(out), sampler(ids, ids % 10).numpy())
    assert images(out, "labels").tolist() == (ids % 10).tolist()
    result = yaml.safe_load((out / "config.yaml").read_text())
    assert (result["scheduler"], result["num_inference_steps"], result["labels"]) == ("DDIMScheduler", 2, "balanced")
    assert main(command) == 0
    assert capsys.readouterr().out.strip().endswith("40 images in 3 shards")
    # The file that was written is itself a configuration of the same data set.
    assert main(["synthesize", "--config", str(out / "config.yaml")]) == 0


def test_network_folder_and_another_scheduler(tmp_path, pipeline, network):
    from diffusers import DPMSolverMultistepScheduler

    flags = ["--model", str(pipeline / "unet"), "--scheduler", "DPMSolverMultistepScheduler", "--seed", "5", *FLAGS]
    assert main(["synthesize", *flags, "--out", str(tmp_path / "a"), "--first-id", "100", "--noise-scale", "1.2"]) == 0
    sampler = kr_fast.Sampler(network.eval(), DPMSolverMultistepScheduler(), 2, seed=5, noise_scale=1.2, micro_batch=8)
    ids = torch.arange(100, 140)
    assert images(tmp_path / "a", "ids").tolist() == ids.tolist()
    # Without guidance nothing says that the last of the 11 embeddings is the null class.
    assert np.array_equal(images(tmp_path / "a"), sampler(ids, ids % 11).numpy())
    # The name of a scheduler takes over the configuration of the folder's own.
    flags[1] = str(pipeline)
    assert main(["synthesize", *flags, "--out", str(tmp_path / "b")]) == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["sampler"]["scheduler"] == "DPMSolverMultistepScheduler"
    other = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["sampler"]["step_table"] != other["sampler"]["step_table"]


def test_labels(tmp_path, pipeline):
    np.save(tmp_path / "labels.npy", np.array([3, 1, 4, 1, 5], np.int32))
    start = ["synthesize", "--model", str(pipeline), *FLAGS]
    assert main([*start, "--labels", str(tmp_path / "labels.npy"), "--count", "0", "--out", str(tmp_path / "a")]) == 0
    assert images(tmp_path / "a", "labels").tolist() == [3, 1, 4, 1, 5]
    assert main([*start, "--labels", "counts:3,0,1", "--out", str(tmp_path / "b")]) == 0
    assert np.bincount(images(tmp_path / "b", "labels")).tolist() == [30, 0, 10]


def test_dit_pipeline(tmp_path):
    """Transformer and autoencoder: images of the autoencoder's size."""
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    norm = {"num_embeds_ada_norm": 6, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
    transformer = diffusers.DiTTransformer2DModel(**sizes, **norm, sample_size=4, patch_size=2)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=4,
    )
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--guidance-scale", "2", *FLAGS, "--out", str(tmp_path / "data")]
    assert main(["synthesize", *flags]) == 0
    assert images(tmp_path / "data").shape == (40, 8, 8, 3)
    assert images(tmp_path / "data", "labels").max() == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model", "absent"],
            "synthesize: model must be a folder (or a repository of the hub, with --allow-download)",
        ),
        ([], "synthesize: model must be a folder (or a repository of the hub, with --allow-download), got nothing"),
        (["--model", "EMPTY"], "synthesize: model must be a folder with config.json, or with unet or transformer and"),
        (["--model", "UNET"], "synthesize: scheduler must be given for a model without one, got nothing for"),
        (["--scheduler", "UNet2DModel"], "synthesize: scheduler must be a scheduler of diffusers, got UNet2DModel"),
        (["--scheduler", "Magic"], "synthesize: scheduler must be a scheduler of diffusers, got Magic"),
        (["--count", "-1"], "synthesize: count must be at least 0, got -1"),
        (["--count", "0"], "synthesize: count must be above 0 for labels without an end, got 0"),
        (["--format", "zarr"], "synthesize: format must be one of npy, npz, webdataset, parquet, got zarr"),
        (["--dtype", "int8"], "synthesize: dtype must be one of float32, bfloat16, float16, got int8"),
        (["--shard-size", "0"], "synthesize: shard_size must be at least 1, got 0"),
        (["--micro-batch", "0"], "synthesize: micro_batch must be in [1, 1000000], got 0"),
        (["--quality", "best"], "synthesize: quality must be one of exact, fused, fast, got best"),
        (["--labels", "train"], "synthesize: labels must be balanced, counts:N,N,... or an .npy file, got train"),
        (["--labels", "counts:1,x"], "synthesize: labels must be counts:N,N,..., got counts:1,x"),
        (["--labels", "counts:0,0"], "LabelPlan: counts must hold numbers >= 0 that do not sum to 0"),
        (["--labels", "absent.npy"], "synthesize: labels must be a file, got absent.npy, which is not there"),
        (["--labels", "counts:" + "1," * 11 + "1"], "synthesize: labels must be below the model's 11 classes, got 11"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_choices_leave_nothing(tmp_path, pipeline, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "UNET": str(pipeline / "unet")}
    chosen = [names.get(flag, flag) for flag in flags]
    model = [] if chosen[:1] in ([], ["--model"]) else ["--model", pipeline]
    assert words in refused(capsys, "--out", tmp_path / "data", *model, *chosen)
    assert not (tmp_path / "data").exists()


def test_models_that_are_refused(tmp_path, capsys):
    def line(config=None, weights=None):
        (tmp_path / "m").mkdir(exist_ok=True)
        if config is not None:
            (tmp_path / "m" / "config.json").write_text(config)
        if weights is not None:
            (tmp_path / "m" / "diffusion_pytorch_model.safetensors").write_text(weights)
        return refused(capsys, "--model", tmp_path / "m", "--out", tmp_path / "data")

    known = "synthesize: model must hold UNet2DModel or DiTTransformer2DModel, got UNet1DModel in"
    assert known in line('{"_class_name": "UNet1DModel"}')
    assert "synthesize: model must hold a configuration of diffusers, got" in line("{")
    assert "synthesize: model must hold a configuration of diffusers, got" in line("[1]")
    assert "synthesize: model must hold readable weights, got" in line('{"_class_name": "UNet2DModel"}')
    assert "synthesize: model must hold readable weights, got" in line(weights="text")
    assert not (tmp_path / "data").exists()


def test_another_data_set_is_refused(tmp_path, pipeline, capsys):
    start = ["synthesize", "--model", str(pipeline), *FLAGS, "--out", str(tmp_path / "data")]
    assert main(start) == 0
    capsys.readouterr()
    line = refused(capsys, *start[1:], "--seed", 1)
    assert "synthesize: sampler.seed must equal 0 of the data set in" in line
    assert "got 1; choose another out" in line
    assert refused(capsys, *start[1:], "--out", pipeline).startswith("kr-fast: synthesize: out must be empty or hold a")


def test_help():
    with pytest.raises(SystemExit) as stop:
        main(["synthesize", "--help"])
    assert stop.value.code == 0
