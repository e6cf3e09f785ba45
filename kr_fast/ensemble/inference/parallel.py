"""Many small pieces of work on torch's threads, one piece to a thread."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def run(items: Iterable, work: Callable[..., None], threads: int, done: Callable[[], None]) -> None:
    """``work(*item)`` for each item, in ``threads`` threads in which torch itself uses one; ``done`` after each.

    torch calls release the GIL, so the pieces run side by side, without a barrier in each layer.
    """
    before = torch.get_num_threads()
    if threads <= 1:
        try:
            torch.set_num_threads(1)
            for item in items:
                work(*item)
                done()
        finally:
            torch.set_num_threads(before)
        return
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # makes this thread take the common number now, and not at its first operator
        torch.set_num_threads(1)  # of this thread, and of threads that start from now on
        ready.wait()

    stop = threading.Event()

    def piece(item: tuple) -> None:
        if not stop.is_set():
            with torch.inference_mode():
                work(*item)

    items = list(items)
    with ThreadPoolExecutor(threads, initializer=start) as pool:
        try:
            results = [pool.submit(piece, item) for item in items]
            for _ in range(threads - len(items)):  # the pool makes its threads as work comes in
                pool.submit(int)
            ready.wait()
            torch.set_num_threads(before)
            for result in results:
                result.result()
                done()
        finally:
            stop.set()
            torch.set_num_threads(before)
