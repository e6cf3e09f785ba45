"""A captured graph: what is called before it, what it holds, and a capture that fails."""

import contextlib
import functools

import pytest
import torch

from kr_fast.runtime.cuda_graph import capture


@pytest.mark.parametrize("fails", [False, True])
def test_order_of_calls(fails, monkeypatch):
    """Warm-ups run on the side stream, the capture on torch's own, and the caller's stream is set again."""
    calls = []

    class Stream:
        wait_stream = lambda self, other: None  # noqa: E731

    @contextlib.contextmanager
    def inside(name, *_, **__):
        calls.append(name)
        yield
        calls.append("end")

    def run():
        calls.append("run")
        if fails and "graph" in calls:
            raise RuntimeError("operation not permitted when stream is capturing")

    own = Stream()
    fakes = {
        "Stream": Stream,
        "CUDAGraph": object,
        "current_stream": lambda: own,
        "set_stream": calls.append,
        "stream": functools.partial(inside, "side"),
        "graph": functools.partial(inside, "graph"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="not permitted") if fails else contextlib.nullcontext():
        capture(run, prepare=lambda: calls.append("prepare"))
    warmups = ["side", "prepare", "run", "prepare", "run", "end", "prepare", "graph", "run"]
    assert calls == [*warmups, *([] if fails else ["end"]), own]


@pytest.mark.gpu
def test_a_graph_replays_from_what_was_prepared():
    count, stream = torch.zeros((), device="cuda"), torch.cuda.current_stream()
    graph = capture(lambda: count.add_(1), prepare=count.zero_, compact=True)
    assert float(count) == 0  # a capture runs nothing
    graph.replay()
    graph.replay()
    assert float(count) == 2
    with pytest.raises(RuntimeError):
        capture(count.item)
    assert torch.cuda.current_stream() == stream
