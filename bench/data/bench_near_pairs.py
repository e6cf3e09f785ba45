"""The search for near-duplicates, against exact distances of all pairs at 9 shifts; of the large sets by itself.

``peak_mib`` is the most anonymous memory of the process while it searches, above that at the start.
"""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast.data.distances import SHARE, Rows, spacing
from kr_fast.data.near_pairs import SHIFTS, near_pairs

# Number, side, channels, and side of the random grid that is enlarged to an image; 0 for noise.
SETS = {
    "4,000 of 28 px": (4000, 28, 1, 7),
    "300 of 224 px in colour": (300, 224, 3, 12),
    "100,000 of 28 px": (100_000, 28, 1, 7),
    "4,000 of 224 px in colour": (4000, 224, 3, 12),
    "4,000 of noise of 224 px in colour": (4000, 224, 3, 0),
}
ALL_PAIRS = list(SETS)[:2]
COPIES = 50


@pytest.fixture(scope="session", params=SETS)
def images(request, tmp_path_factory):
    """A memory map; the last 50 images are others with noise, or a pixel beside."""
    count, side, channels, grid = SETS[request.param]
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "images.npy"
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, channels))
    for image in pixels:
        coarse = draw.integers(0, 256, (grid or side, grid or side, channels), dtype=np.uint8)
        coarse = Image.fromarray(coarse.squeeze()).resize((side, side), Image.Resampling.BICUBIC)
        image[:] = np.asarray(coarse).reshape(image.shape)
    for index in range(COPIES):
        noisy = pixels[index] + draw.integers(-2, 3, pixels[index].shape)
        pixels[-1 - index] = np.roll(pixels[index], (1, -1), (0, 1)) if index % 2 else noisy.clip(0, 255)
    pixels.flush()
    return request.param, torch.from_numpy(np.load(path, mmap_mode="c"))


def kr_fast(images, threshold):
    found = near_pairs(images, threshold)
    return set(zip(found.first.tolist(), found.second.tolist(), strict=True))


def all_pairs(images, threshold):
    height, width, found = *images.shape[1:3], set()
    for dy, dx in (shift for shift in SHIFTS if shift >= (0, 0)):  # pairs in both orders
        x, y = (
            Rows(images[:, max(a, 0) : height + min(a, 0), max(b, 0) : width + min(b, 0)].contiguous())
            for a, b in ((dy, dx), (-dy, -dx))
        )
        for first, part in x.blocks(len(y)):
            near = (part.squared_distances(y) <= threshold**2 * x.width).nonzero() + torch.tensor([first, 0])
            found |= {(min(pair), max(pair)) for pair in near.tolist() if pair[0] != pair[1]}
    return found


class Peak(threading.Thread):
    """``with Peak() as peak``: then ``peak.mib``."""

    def __enter__(self):
        self.before = self.most = self._anonymous()
        self.done = threading.Event()
        self.start()
        return self

    def run(self):
        while not self.done.wait(0.01):
            self.most = max(self.most, self._anonymous())

    def __exit__(self, *error):
        self.done.set()
        self.join()
        self.mib = (self.most - self.before) >> 10

    def _anonymous(self):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


@pytest.mark.parametrize("provider", [kr_fast, all_pairs], ids=["kr_fast", "all pairs"])
def test_near_pairs(benchmark, images, one_thread, provider):
    name, images = images
    if provider is all_pairs and name not in ALL_PAIRS:
        pytest.skip("takes minutes to hours")
    benchmark.group = f"near_pairs {name}"
    threshold = SHARE * spacing(images[:: -(-len(images) // 500)])
    with Peak() as peak:
        found = provider(images, threshold)
    assert found == {(index, len(images) - 1 - index) for index in range(COPIES)}
    benchmark.extra_info["peak_mib"] = peak.mib
    benchmark.pedantic(provider, (images, threshold), rounds=1 if len(images) > 4000 else 3)
