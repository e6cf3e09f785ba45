"""Sets drawn ahead by a second thread: the same images in the same order, one set ahead at most, errors told."""

import threading

import numpy as np
import pytest
import torch
from toy_sampler import plan, sampler

from kr_fast.recycling.drawing import Drawing, KeptSets, ahead

IMAGES = 20  # two micro-batches of 8 and a part of one


@pytest.fixture
def threads():
    """``threads(count)`` for torch; the number of before again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawing(before=None, kept=None):
    return Drawing(sampler(before=before), plan(), IMAGES, kept)


@pytest.mark.parametrize("count", [1, 2, 3])  # drawn where they are asked for; one thread each; one and two
def test_sets_are_those_of_their_ids(threads, count):
    threads(count)
    one = sampler(micro_batch=8)
    with ahead(drawing(), [0, 3, 1]) as sets:
        results = list(sets)
    assert torch.get_num_threads() == count
    for period, (ids, labels, images) in zip([0, 3, 1], results, strict=True):
        assert torch.equal(ids, torch.arange(period * IMAGES, (period + 1) * IMAGES))
        assert torch.equal(labels, plan().labels(ids))
        assert torch.equal(images, one(ids, labels))


def test_next_set_is_drawn_while_one_is_in_use(threads):
    """Only the next one, with half of the threads; all are the caller's with the last set."""
    threads(4)
    others, drawn = [], threading.Semaphore(0)

    def before(batches):
        if threading.current_thread() is not threading.main_thread():
            others.append(torch.get_num_threads())
        drawn.release()

    with ahead(drawing(before), range(3)) as sets:
        for period in range(3):
            next(sets)
            assert torch.get_num_threads() == (2 if period < 2 else 4)
            if period == 0:
                for _ in range(6):  # micro-batches of the set in use and of the next
                    assert drawn.acquire(timeout=60)
                assert not drawn.acquire(timeout=0.1)
    assert set(others) == {2}
    assert len(others) >= 3


@pytest.mark.parametrize("end", ["use", "drawing"])
def test_an_error_ends_the_drawing(threads, end):
    """Of the caller, or of a micro-batch of the second set in the other thread."""
    threads(2)
    seen, begun = [], threading.Event()

    def before(batches):
        if threading.current_thread() is not threading.main_thread() and batches >= 3:
            begun.set()
            if end == "drawing":
                raise ValueError("no image")
        seen.append(batches)

    with pytest.raises(ValueError, match="no image"), ahead(drawing(before), range(50)) as sets:
        for _ in sets:
            assert begun.wait(60)
            if end == "use":
                raise ValueError("no image")
    assert torch.get_num_threads() == 2
    assert len(seen) <= 6
    assert not any(thread.name.startswith("kr_fast drawing") for thread in threading.enumerate())


def test_kept_sets_are_read_and_those_of_others_are_not(threads, tmp_path):
    threads(2)

    def kept(sampling):
        return KeptSets(tmp_path / "sets", {"sampling": sampling}, torch.device("cpu"))

    def refuse(batches):
        raise AssertionError("drawn again")

    kept("a").discard_outdated()
    expected = [drawing(kept=kept("a"))(period) for period in (0, 1)]
    kept("a").discard_outdated()
    with ahead(drawing(refuse, kept("a")), range(2)) as sets:
        for result, values in zip(sets, expected, strict=True):
            assert all(map(torch.equal, result, values))
    assert np.load(kept("a").path(1)).dtype == np.uint8
    kept("b").discard_outdated()
    assert 0 not in kept("b")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["made_from.json"]
