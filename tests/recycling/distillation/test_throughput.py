"""How many images a second are drawn, and which of them while nobody waits for them."""

import contextlib

import pytest
import torch
from toy_runs import metrics
from toy_sampler import plan, sampler

from kr_fast.recycling import throughput
from kr_fast.recycling.drawing import Drawing, ahead
from kr_fast.recycling.throughput import SynthesisClock
from kr_fast.report import tables


class Steps:
    """A clock that stands still until it is told otherwise."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_what_is_drawn_while_nobody_waits_is_hidden(monkeypatch):
    """By hand: one thread of two draws from 1 to 5, and its user waits from 4 on; then all threads from 5 to 6."""
    time, clock = Steps(), SynthesisClock()
    monkeypatch.setattr(throughput, "time", time)
    assert clock.figures() == {"synthesis": None, "hidden": None}
    drawing, waiting = contextlib.ExitStack(), contextlib.ExitStack()
    time.now = 1.0
    drawing.enter_context(clock.drawing(8, 0.5))
    time.now = 4.0
    waiting.enter_context(clock.waiting())
    time.now = 5.0
    drawing.close()
    with clock.drawing(4):
        time.now = 6.0
    waiting.close()
    time.now = 9.0
    assert (clock.images, clock.seconds, clock.hidden) == (12, 0.5 * 4 + 1, 0.5 * 3)
    assert clock.figures() == {"synthesis": 4.0, "hidden": 0.5}


@pytest.mark.parametrize("count", [1, 2])
def test_every_drawn_image_is_timed_once(count):
    """One thread draws where it is asked, so that nothing is hidden; what two threads hide depends on the machine."""
    before, draw = torch.get_num_threads(), Drawing(sampler(), plan(), 20)
    torch.set_num_threads(count)
    try:
        with ahead(draw, range(3)) as sets:
            assert sum(len(ids) for ids, _, _ in sets) == 60
    finally:
        torch.set_num_threads(before)
    assert draw.clock.images == 60
    assert draw.clock.seconds > 0
    assert 0 <= draw.clock.figures()["hidden"] <= 1
    if count == 1:
        assert draw.clock.hidden == pytest.approx(0, abs=1e-9)


@pytest.mark.pipeline
def test_a_run_tells_its_rates(finished):
    """Of one thread, as here, which hides nothing."""
    figures = metrics(finished[0])["throughput"]
    assert set(figures) == {"generator", "synthesis", "distillation", "hidden"}
    assert all(figures[name] > 0 for name in ("generator", "synthesis", "distillation"))
    assert figures["hidden"] == pytest.approx(0, abs=1e-6)
    assert tables.throughput({"throughput": figures}) in finished[1]


def test_rates_in_words():
    row = {"generator": 5210.4, "synthesis": 1234.5, "distillation": None, "hidden": 0.251}
    words = "images/s: generator training 5,210, synthesis 1,234; 25.10 % of the synthesis hidden behind the Student's"
    assert tables.throughput({"throughput": row}) == f"{words} training"
    assert tables.throughput({}) == tables.throughput({"throughput": dict.fromkeys(row)}) == ""
