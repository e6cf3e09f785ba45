"""The rate of each sink, and of sampling into it.

First the writers alone, on 4,096 images of 32x32x3 that are there already: ``PIL`` is the usual loop, one PNG file an
image; ``webdataset, PIL`` is webdataset's ``TarWriter`` with the same encoder. Ours end with the files synced to disk,
hashed, renamed and noted in the journal; the rivals do none of that. Then whole data sets: the digits UNet with ten
evaluations an image, ``no sink`` being the sampler alone; a rate below 95 % of it would mean that a sink holds it up.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import kr_fast
from kr_fast.models import unet
from kr_fast.synthesis import Batch

COUNT = 4096
FORMATS = ("npy", "npz", "webdataset", "parquet")


class Prepared:
    """A sampler whose images were made before."""

    micro_batch, device = 256, torch.device("cpu")

    def __init__(self, images):
        self.images = images

    def describe(self):
        return {}

    def stream(self, plan, ids):
        for start in range(ids.start, ids.stop, self.micro_batch):
            part = torch.arange(start, min(start + self.micro_batch, ids.stop))
            yield Batch(part, plan.labels(part), self.images[part[0] : part[-1] + 1])


def pictures():
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(COUNT, 3, 4, 4, generator=random)
    fine = torch.nn.functional.interpolate(coarse, 32, mode="bicubic").permute(0, 2, 3, 1)
    return (fine * 255 + torch.randn(COUNT, 32, 32, 3, generator=random) * 4).clamp(0, 255).byte().contiguous()


def pil(images, labels, out):
    out.mkdir()
    for i, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
        Image.fromarray(image).save(out / f"{i:06d}_{label}.png")


def webdataset(images, labels, out):
    writer = pytest.importorskip("webdataset").TarWriter(str(out))
    for i, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
        writer.write({"__key__": f"{i:012d}", "png": Image.fromarray(image), "cls": label})
    writer.close()


def ours(sampler, out, format, count):
    return kr_fast.synthesize(
        sampler, kr_fast.LabelPlan.balanced(10), out, count=count, format=format, shard_size=count // 2
    )


def remove(out):
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")


@pytest.mark.parametrize("provider", [*FORMATS, "PIL", "webdataset, PIL"])
def test_sink(benchmark, tmp_path, provider):
    benchmark.group = f"writing {COUNT} images of 32x32x3"
    images, labels, out = pictures(), torch.arange(COUNT) % 10, tmp_path / "out"
    if provider == "parquet":
        pytest.importorskip("pyarrow")
    if provider == "npy":
        ours(Prepared(images), out, "npy", COUNT)
        result = np.concatenate([np.load(path) for path in sorted(out.glob("*.images.npy"))])
        assert np.array_equal(result, images.numpy())
    rivals = {"PIL": pil, "webdataset, PIL": webdataset}

    def write():
        if provider in rivals:
            rivals[provider](images, labels, out)
        else:
            ours(Prepared(images), out, provider, COUNT)

    benchmark.pedantic(write, setup=lambda: remove(out), rounds=5)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["images_per_second"] = COUNT / benchmark.stats.stats.median


@pytest.mark.parametrize("provider", ["no sink", *FORMATS, "device"])
def test_sampling_into_a_sink(benchmark, tmp_path, provider):
    from diffusers import FlowMatchEulerDiscreteScheduler

    count, plan, out = 512, kr_fast.LabelPlan.balanced(10), tmp_path / "out"
    benchmark.group = f"sampling and writing {count} images, digits UNet, 10 evaluations"
    if provider == "parquet":
        pytest.importorskip("pyarrow")
    torch.manual_seed(0)
    network = unet(8, 8, 1, 10, widths=(32, 64)).eval()
    sampler = kr_fast.Sampler(network, FlowMatchEulerDiscreteScheduler(), 10, seed=1, micro_batch=256)

    def sample():
        if provider == "no sink":
            for _ in sampler.stream(plan, range(count)):
                pass
        elif provider == "device":
            kr_fast.synthesize(sampler, plan, None, count=count, format="device", shard_size=count // 2)
        else:
            ours(sampler, out, provider, count)

    benchmark.pedantic(sample, setup=lambda: remove(out), rounds=3, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["images_per_second"] = count / benchmark.stats.stats.median
