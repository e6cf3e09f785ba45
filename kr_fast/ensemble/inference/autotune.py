"""How much goes through a GPU's program at once, and which kernel runs each layer: measured where there is a GPU.

Candidates for a step: few enough images of a group of models that the widest layer's input and output stay in the L2
cache; eight times as many, which pays for fewer launches with traffic; and one model with many images, which is the
usual loop. In each, every layer takes the fastest of its kernels, the library's among them, a residual block is one
kernel where that is faster than its layers, and the fastest step wins: so the loop over models runs where it is the
fastest.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kr_fast.backends import native
from kr_fast.backends.arguments import View
from kr_fast.ensemble.graph.lowering import shape
from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.inference.batched_layers import LAST, BatchedLayer, ImageBatch
from kr_fast.ensemble.inference.batched_program import BatchedProgram
from kr_fast.ensemble.inference.chunks import GPU_BUDGET, GPU_MOST
from kr_fast.ensemble.inference.residual_blocks import KERNEL, BatchedResidualBlock
from kr_fast.runtime import cuda_graph
from kr_fast.runtime.errors import fail, first_line
from kr_fast.runtime.log import logger

CACHE = 24 << 20  # bytes, where the device does not say how large its L2 cache is
MOST_MODELS, WIDER = 16, 8
REPEATS = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """``models`` models and ``images`` images in one step."""

    models: int
    images: int


def cache_bytes(device: torch.device) -> int:
    """Half of the device's L2 cache: the other half holds weights and what is written meanwhile."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return size // 2 or CACHE


def tiles(program: BatchedProgram, count: int, chunk: int | None, free: int) -> list[Tile]:
    """The candidates that fit ``free`` bytes, for ``count`` models; ``chunk`` fixes the images.

    Raises: UserError if not even one model with ``chunk`` images fits.
    """
    most = free // max(program.bytes_per_image, 1)
    fit = max(1, cache_bytes(program.device) // program.widest)
    if chunk is not None:
        if chunk > most:
            fail("ModelArray", "chunk", f"be at most {max(most, 1)} for the {free >> 20} MiB that are free", chunk)
        all_tiles = [Tile(n, chunk) for n in (min(count, max(1, fit // chunk)), min(count, MOST_MODELS), 1)]
    else:
        models = min(count, MOST_MODELS)
        images = _power(fit // models)
        if images < 8:  # a last layer of 4 x 4 pixels fills a tile of 128 rows with 8 images
            images = _power(min(8, fit))
            models = max(1, min(count, fit // images))
        alone = min(GPU_MOST, _power(GPU_BUDGET // program.widest))
        all_tiles = [Tile(models, images), Tile(models, WIDER * images), Tile(1, alone)]
    return list(dict.fromkeys(tile for tile in all_tiles if tile.models * tile.images <= most)) or [Tile(1, chunk or 1)]


def _power(number: int) -> int:
    return 2 ** int(math.log2(max(number, 1)))


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Least time of a call in several; on a GPU in a graph, if possible: launches from Python do not count."""
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    def several() -> None:
        for _ in range(REPEATS):
            run()

    try:
        replay, times = cuda_graph.capture(several).replay, []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it cannot be captured: a runner launches it one by one as well, and says so
        replay, times = several, []
    for _ in range(3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / REPEATS)
    return min(times)


@torch.inference_mode()
def choose(
    program: BatchedProgram, candidates: list[Tile], images: torch.Tensor, view: View, timer: Callable = seconds
) -> Tile:
    """The fastest tile for chunks of images like ``images`` ``[1, H, W, C]``; the program's kernels are set for it.

    Raises: Unsupported where a step cannot run; UserError where none fits the memory.
    """
    best, best_time, kernels = candidates[0], math.inf, {}
    for tile in candidates:
        group, chunk = slice(0, tile.models), images.expand(tile.images, -1, -1, -1).contiguous()
        try:
            program.kernels = fastest_kernels(program, tile, ImageBatch(chunk, view), timer)
            time_of_step = timer(lambda: program.run(group, chunk, view), program.device)  # noqa: B023
        except torch.OutOfMemoryError:
            continue
        except (RuntimeError, *native.triton_errors()) as error:
            why = f"a step of {tile.models} models and {tile.images} images fails: {first_line(error)}"
            raise Unsupported(why) from None
        if time_of_step / (tile.models * tile.images) < best_time:
            best, best_time, kernels = tile, time_of_step / (tile.models * tile.images), program.kernels
    if not kernels:
        fail("ModelArray", "chunk", "be given smaller: none of the steps tried fits the GPU's memory", candidates)
    program.kernels = kernels
    text = "ModelArray: steps of %d models and %d images, %.3g us for an image and model; kernels: %s"
    logger.info(text, best.models, best.images, best_time * 1e6, kernels)
    return best


def fastest_kernels(program: BatchedProgram, tile: Tile, chunk: ImageBatch, timer: Callable) -> dict[str, str]:
    """Layer -> its fastest kernel for the tile, or that of its whole residual block; what is alike is measured once."""
    group, by_layer, by_block, kernels, least = slice(0, tile.models), {}, {}, {}, {}
    in_blocks = {part for block in program.blocks.values() for part in block.nodes}
    for node, bound in program.bound.items():
        source = node.args[0]
        first = source.op == "placeholder"
        names = bound.kernels(first)
        key = _alike(node, bound)
        if key not in by_layer and (len(names) > 1 or node in in_blocks):
            x = chunk if first else _noise(shape(source), tile, program)
            other = _noise(shape(node), tile, program) if bound.layer.add else None
            times = {
                name: timer(lambda b=bound, n=name, x=x, other=other: b.run(group, n, x, other), program.device)
                for name in names
            }
            by_layer[key] = min(times, key=times.get), min(times.values())
        kernels[bound.layer.module], least[node] = by_layer.get(key, (names[0], None))
    for block in program.blocks.values():
        key = tuple(_alike(node, program.bound[node]) for node in block.nodes)
        if key not in by_block:
            x = _noise(shape(block.source), tile, program)
            by_block[key] = _time_block(block, group, x, program, timer)
        if by_block[key] < sum(least[node] for node in block.nodes):
            kernels |= dict.fromkeys(block.names, KERNEL)
    return kernels


def _alike(node: fx.Node, bound: BatchedLayer) -> tuple:
    """The same for layers that take the same time."""
    layer = bound.layer
    return bound.weight.shape[1:], shape(node.args[0]), repr(layer.activation), layer.add, repr(bound.options)


def _time_block(
    block: BatchedResidualBlock, group: slice, x: torch.Tensor, program: BatchedProgram, timer: Callable
) -> float:
    """Infinite, with one log line, where the kernel fails: its layers have others."""
    try:
        return timer(lambda: block.run(group, x), program.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("ModelArray: %s runs by its layers' kernels: %s", " + ".join(block.names), first_line(error))
        return math.inf


def _noise(size: tuple[int, ...], tile: Tile, program: BatchedProgram) -> torch.Tensor:
    x = torch.randn(tile.models * tile.images, *size[1:], device=program.device).to(program.dtype)
    return x.contiguous(memory_format=LAST) if x.ndim == 4 else x
