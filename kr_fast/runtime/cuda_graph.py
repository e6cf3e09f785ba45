"""A sequence of kernels as a CUDA graph: captured once, replayed without a look from the host."""

from collections.abc import Callable
from typing import Any

import torch

WARMUPS = 2  # calls before a capture, in which libraries choose algorithms, compile and allocate workspaces


def capture(
    run: Callable[[], Any], *, prepare: Callable[[], Any] | None = None, pool: Any = None, compact: bool = False
) -> torch.cuda.CUDAGraph:  # needs a GPU
    """``run`` as a graph of the current device; warmed up on another stream, as a capture demands.

    Args:
        run: launches alone: no wait for the device, no memory that is taken otherwise than from torch's allocator.
        prepare: called before every warm-up and before the capture, outside the graph; sets what ``run`` changes.
        pool: of :func:`torch.cuda.graph_pool_handle`, for graphs that share their memory.
        compact: give what the warm-ups took back to the device, since a graph takes memory of its own.
    Raises: RuntimeError where ``run`` does what a capture forbids; the current stream is then the one from before.
    """
    prepare = prepare or (lambda: None)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            prepare()
            run()
    current.wait_stream(side)
    if compact:
        torch.cuda.empty_cache()
    prepare()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    finally:
        torch.cuda.set_stream(current)  # where a capture fails, torch stays on the stream of it
    return graph
