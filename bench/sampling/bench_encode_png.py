"""encode_png against PIL's encoder, one thread against one thread.

``PIL`` compresses at its default level 6, ``PIL level 0`` stores, as we do. ``copy`` is the images copied, which no
encoder of this kind can beat. The images are smooth, as photographs are, so that PIL's compression is not at its worst.
"""

import io

import pytest
import torch
from PIL import Image

import kr_fast

# CIFAR, MedMNIST and ImageNet: the batch is about 0.8, 0.8 and 2.4 MB, inside the second or third cache.
SHAPES = [(256, 32, 32, 3), (1024, 28, 28, 1), (16, 224, 224, 3)]


def smooth(shape):
    batch, height, width, channels = shape
    coarse = torch.rand(batch, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    return (fine * 255 + torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4).clamp(0, 255).byte()


def pil(images, **options):
    files = []
    for image in images.numpy():
        buffer = io.BytesIO()
        Image.fromarray(image if image.shape[2] > 1 else image[..., 0]).save(buffer, "png", **options)
        files.append(buffer.getbuffer())
    return files


PROVIDERS = {
    "kr_fast": (1, kr_fast.encode_png),
    "kr_fast, 2 threads": (2, kr_fast.encode_png),
    "PIL": (1, pil),
    "PIL level 0": (1, lambda images: pil(images, compress_level=0)),
    "copy": (1, torch.clone),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_png(benchmark, shape, provider):
    benchmark.group = f"encode_png {shape}"
    threads, function = PROVIDERS[provider]
    images, before = smooth(shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if provider != "copy":
            decoded = Image.open(io.BytesIO(bytes(function(images)[-1])))
            assert decoded.tobytes() == images[-1].numpy().tobytes()
        benchmark(function, images)
    finally:
        torch.set_num_threads(before)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["images_per_second"] = shape[0] / benchmark.stats.stats.min
        benchmark.extra_info["pixel_bytes_per_second"] = images.numel() / benchmark.stats.stats.min
