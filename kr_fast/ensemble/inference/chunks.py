"""How many images go through a network together: enough to pay for its calls and weights, few enough for the cache."""

import functools
import math

import torch

from kr_fast.backends.cpu.nn import winograd_batch_size

# Bytes of the widest layer's inputs and output in one chunk. On a CPU with 1 MiB of L2 a core ResNet-20 ran fastest
# with 32 images (6 MiB), 4 to 15 % faster than with 16 or 64. A network of many weights and few pixels takes more, so
# that a chunk reads no more bytes of weights than it writes of activations: 64 for an airbench-like one, 32 for
# ResNet-18, where 8 would take 26 and 16 % longer. The nearest numbers that fill Winograd's blocks of tiles, 84 and 42,
# are 2 to 5 % faster still, where the last chunk is not much larger than what is left for it. The GPU's figure is a
# guess that no GPU has measured.
CPU_BUDGET, GPU_BUDGET = 6 << 20, 512 << 20
CPU_MOST, GPU_MOST = 128, 4096
# A network of many layers and little work in each takes more still, up to WIDEST, so that calls and the reading of
# weights take SHARE of its time at most: MobileNetV2 took 116 us an image of 32 px with 64 images, 147 with 32 and 227
# with 16, Swin-T 1.8 ms with 32 and 3.0 with 8. Beyond WIDEST the C library maps memory anew for each tensor.
WIDEST, SHARE = 24 << 20, 0.05
# Seconds: of a call, of a byte of weights read, of a product and of a byte written. Only their ratios count.
CALL, READ, PRODUCT, WRITE = 25e-6, 5e-11, 1e-11, 1e-10
FEW = 16  # images of a chunk, below which calls cost more than a thread without work


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what activations free for the next ones.

    glibc gives memory back to the system when a few freed megabytes lie at the end of the heap, and takes its measure
    of "few" from the largest block of its own that was freed before. ResNet-20 then met 3,000 page faults a chunk, a
    third of its time. One block of nearly the largest size that counts, never touched, sets the measure.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def most_images(widest: int, written: int, weights: int, products: int, calls: int) -> int:
    """Images of a chunk on a CPU, for a network that needs ``widest`` bytes for a layer, writes ``written`` bytes and
    does ``products`` multiplications an image, and reads ``weights`` bytes in ``calls`` calls a chunk."""
    seconds = PRODUCT * products + WRITE * written or 1
    paid = (CALL * calls + READ * weights) / (SHARE * seconds)
    return _power(min(max(CPU_BUDGET // widest, weights // max(written, 1), min(paid, WIDEST // widest)), CPU_MOST))


def most_on_a_gpu(widest: int) -> int:
    """Images of a chunk of one model on a GPU."""
    return _power(min(GPU_BUDGET // widest, GPU_MOST))


def _power(number: float) -> int:
    return 2 ** int(math.log2(max(number, 1)))


def chunk_size(most: int, images: int, pieces: int, tiled: bool) -> int:
    """Images of a chunk, at most about ``most``: chunks alike of which the last wastes little, and ``pieces`` of them
    if there are so many images. ``tiled``: there are convolutions by Winograd's algorithm."""
    size = winograd_batch_size(most, images) if tiled else most
    count, pieces = -(-images // size), min(pieces, images // FEW)
    if count >= pieces and count * size <= 1.04 * images:
        return size
    return max(-(-images // max(count, pieces, 1)), 2)  # torch takes a single image by other code
