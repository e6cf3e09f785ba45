"""How much goes through a GPU's program at once, and which kernel runs each layer: measured where there is a GPU.

Candidates for a step: few enough images of a block of models that the widest layer's input and output stay in the L2
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

from kr_fast.ensemble.graph.lowering import shape
from kr_fast.ensemble.graph.tracing import Unsupported
from kr_fast.ensemble.inference.block_layers import LAST, BoundLayer, Pixels
from kr_fast.ensemble.inference.blocks import Batched
from kr_fast.ensemble.inference.chunks import GPU_BUDGET, GPU_MOST
from kr_fast.ensemble.inference.residual_blocks import KERNEL, BoundBlock
from kr_fast.ops.batched.model_conv2d import View
from kr_fast.runtime.errors import fail, first_line
from kr_fast.runtime.log import logger

CACHE = 24 << 20  # bytes, where the device does not say how large its L2 cache is
BLOCK, WIDER = 16, 8
REPEATS, WARM_UP = 8, 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """``models`` models and ``images`` images in one step."""

    models: int
    images: int


def cache_bytes(device: torch.device) -> int:
    """Half of the device's L2 cache: the other half holds weights and what is written meanwhile."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return size // 2 or CACHE


def plans(program: Batched, count: int, chunk: int | None, free: int) -> list[Plan]:
    """The candidates that fit ``free`` bytes, for ``count`` models; ``chunk`` fixes the images.

    Raises: UserError if not even one model with ``chunk`` images fits.
    """
    most = free // max(program.bytes_per_image, 1)
    fit = max(1, cache_bytes(program.device) // program.widest)
    if chunk is not None:
        if chunk > most:
            fail("ModelArray", "chunk", f"be at most {max(most, 1)} for the {free >> 20} MiB that are free", chunk)
        found = [Plan(min(count, max(1, fit // chunk)), chunk), Plan(min(count, BLOCK), chunk), Plan(1, chunk)]
    else:
        models = min(count, BLOCK)
        images = _power(fit // models)
        if images < 8:  # a last layer of 4 x 4 pixels fills a tile of 128 rows with 8 images
            images = _power(min(8, fit))
            models = max(1, min(count, fit // images))
        alone = min(GPU_MOST, _power(GPU_BUDGET // program.widest))
        found = [Plan(models, images), Plan(models, WIDER * images), Plan(1, alone)]
    return list(dict.fromkeys(plan for plan in found if plan.models * plan.images <= most)) or [Plan(1, chunk or 1)]


def _power(number: int) -> int:
    return 2 ** int(math.log2(max(number, 1)))


def captured(run: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """``run`` as a graph; called before on another stream, so that libraries and compilers have done their part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except RuntimeError:
        torch.cuda.set_stream(current)  # where a capture fails, torch stays on the stream of it
        raise
    return graph


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
        replay, times = captured(several).replay, []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it cannot be captured: a sweep launches it one by one as well, and says so
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
    program: Batched, candidates: list[Plan], images: torch.Tensor, view: View, timer: Callable = seconds
) -> Plan:
    """The fastest plan for chunks of images like ``images`` ``[1, H, W, C]``; the program's kernels are set for it.

    Raises: Unsupported where a step cannot run; UserError where none fits the memory.
    """
    best, best_time, kernels = candidates[0], math.inf, {}
    for plan in candidates:
        block, chunk = slice(0, plan.models), images.expand(plan.images, -1, -1, -1).contiguous()
        try:
            program.kernels = fastest_kernels(program, plan, Pixels(chunk, view), timer)
            took = timer(lambda: program.run(block, chunk, view), program.device)  # noqa: B023
        except torch.OutOfMemoryError:
            continue
        except RuntimeError as error:
            raise Unsupported(
                f"a step of {plan.models} models and {plan.images} images fails: {first_line(error)}"
            ) from None
        took /= plan.models * plan.images
        if took < best_time:
            best, best_time, kernels = plan, took, program.kernels
    if not kernels:
        fail("ModelArray", "chunk", "be given smaller: none of the steps tried fits the GPU's memory", candidates)
    program.kernels = kernels
    logger.info(
        "ModelArray: steps of %d models and %d images, %.3g us for an image and model; kernels: %s",
        best.models, best.images, best_time * 1e6, kernels,
    )  # fmt: skip
    return best


def fastest_kernels(program: Batched, plan: Plan, chunk: Pixels, timer: Callable) -> dict[str, str]:
    """Layer -> its fastest kernel for the plan, or that of its whole residual block; what is alike is measured once."""
    block, known, wholes, found, least = slice(0, plan.models), {}, {}, {}, {}
    in_blocks = {part for whole in program.blocks.values() for part in whole.nodes}
    for node, bound in program.bound.items():
        source = node.args[0]
        first = source.op == "placeholder"
        names = bound.kernels(first)
        key = _alike(node, bound)
        if key not in known and (len(names) > 1 or node in in_blocks):
            x = chunk if first else _noise(shape(source), plan, program)
            other = _noise(shape(node), plan, program) if bound.layer.add else None
            times = {name: _time(bound, block, name, x, other, program, timer) for name in names}
            known[key] = min(times, key=times.get), min(times.values())
        found[bound.layer.module], least[node] = known.get(key, (names[0], None))
    for whole in program.blocks.values():
        key = tuple(_alike(node, program.bound[node]) for node in whole.nodes)
        if key not in wholes:
            x = _noise(shape(whole.source), plan, program)
            wholes[key] = _time_whole(whole, block, x, program, timer)
        if wholes[key] < sum(least[node] for node in whole.nodes):
            found |= dict.fromkeys(whole.names, KERNEL)
    return found


def _alike(node: fx.Node, bound: BoundLayer) -> tuple:
    """The same for layers that take the same time."""
    layer = bound.layer
    return bound.weight.shape[1:], shape(node.args[0]), repr(layer.activation), layer.add, repr(bound.options)


def _time(bound: BoundLayer, block: slice, name: str, x, other, program: Batched, timer: Callable) -> float:
    return timer(lambda: bound.run(block, name, x, other), program.device)


def _time_whole(whole: BoundBlock, block: slice, x: torch.Tensor, program: Batched, timer: Callable) -> float:
    """Infinite, with one log line, where the kernel fails: its layers have others."""
    try:
        return timer(lambda: whole.run(block, x), program.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("ModelArray: %s runs by its layers' kernels: %s", " + ".join(whole.names), first_line(error))
        return math.inf


def _noise(found: tuple[int, ...], plan: Plan, program: Batched) -> torch.Tensor:
    x = torch.randn(plan.models * plan.images, *found[1:], device=program.device).to(program.dtype)
    return x.contiguous(memory_format=LAST) if x.ndim == 4 else x
