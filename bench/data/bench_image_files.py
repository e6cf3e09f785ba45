"""JPEGs of mixed sizes to 64 px, against Pillow decoding them and doing nothing more, in as many threads.

``kr_fast`` reads every header before, crops, resizes, and checks the range of the pixels; ``to disk`` also writes the
memory map with its hashes, synced, and ``again`` is the next start, which checks the hashes of files and pixels.
The aim is 80 % of Pillow's rate.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast.data import ReadOptions, image_files
from kr_fast.data.memory_map import convert

SIZE = 64
# Number and sides: photographs as data sets hold them, and as cameras and scanners make them.
SETS = {"160 to 640 px": (500, (160, 240, 320, 480, 640)), "640 to 2,000 px": (60, (640, 1024, 1500, 2000))}


@pytest.fixture(scope="session", params=SETS)
def photographs(request, tmp_path_factory):
    """Smooth images with some noise, at quality 90: about 2 bits a pixel, as photographs."""
    count, sides = SETS[request.param]
    folder, files = tmp_path_factory.mktemp(request.param.replace(" ", "_").replace(",", "")), []
    draw = np.random.default_rng(0)
    for index in range(count):
        width, height = draw.choice(sides, 2)
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(coarse) + draw.normal(0, 6, (height, width, 1))
        files.append(folder / f"{index}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def pillow(files, out):
    def decode(file):
        with Image.open(file) as image:
            image.load()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(decode, files):
            pass


def survey(files):
    return image_files.Survey({"images": files}, None, ReadOptions(image_size=SIZE, resize="crop"))


def kr_fast(files, out):
    return image_files.in_memory({"train": image_files.FileRows(survey(files), "images")})


def to_disk(files, out):
    return convert(out, {"train": image_files.FileRows(survey(files), "images")})


PROVIDERS = {"Pillow": pillow, "kr_fast": kr_fast, "kr_fast, to disk": to_disk, "kr_fast, again": to_disk}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_image_files(benchmark, photographs, tmp_path, threads, provider):
    benchmark.group = f"{len(photographs)} JPEGs {photographs[0].parent.name} to {SIZE} px, {threads} threads"
    out, function = tmp_path / "map", PROVIDERS[provider]
    if provider == "kr_fast, again":
        function(photographs, out)

    def setup():
        if provider == "kr_fast, to disk":
            shutil.rmtree(out, ignore_errors=True)
        return (photographs, out), {}

    result = benchmark.pedantic(function, setup=setup, rounds=3)
    if result is not None:
        assert result.pixels["train"].shape == (len(photographs), SIZE, SIZE, 3)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["images_per_second"] = len(photographs) / benchmark.stats.stats.min
