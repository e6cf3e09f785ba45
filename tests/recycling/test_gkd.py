"""What a Student learns from: sets drawn ahead by a second thread (the same images in the same order, one set ahead at
most, errors told), and of each image the Teacher's probabilities, its top class, or the image's own class."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_sampler import plan, sampler

from kr_fast.data import Dataset, Split, to_float
from kr_fast.recycling import drawing as drawing_module
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.drawing import Drawing, KeptSets, ahead
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.runtime import state
from kr_fast.runtime.storage.journal import Journal

IMAGES = 20  # two micro-batches of 8 and a part of one
COUNT, CLASSES = 32, 4
PLAIN = {"student_shift": 0, "student_flip": False, "student_rotate": 0.0, "student_scale": 0.0}


@pytest.fixture
def threads():
    """``threads(count)`` for torch; the number of before again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawing(before=None, kept=None):
    return Drawing(sampler(before=before), plan(), IMAGES, kept)


@pytest.mark.parametrize("count", [1, 2, 3])  # drawn where they are asked for; one thread each, or of three
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


@pytest.mark.parametrize(
    ("images", "large", "shared"), [(IMAGES, 1 << 20, True), (IMAGES, 1, False), (8, 1 << 20, False)]
)
def test_a_lone_set_is_drawn_by_one_thread_where_two_do_not_help(threads, monkeypatch, images, large, shared):
    """Where its micro-batches are large, or one: that has all of torch's threads. The images are the same."""
    threads(2)
    monkeypatch.setattr(drawing_module, "LARGE", large)
    counts, begun = [], threading.Barrier(2, timeout=60)

    def before(batches):
        counts.append(torch.get_num_threads())
        if shared and len(counts) <= 2:
            begun.wait()  # for the other thread

    ids, labels, drawn = Drawing(sampler(before=before), plan(), images)(0)
    assert torch.equal(drawn, sampler(micro_batch=8)(ids, labels))
    assert set(counts) == {1 if shared else 2}


def test_both_threads_draw_with_as_many_of_torch_s(threads):
    """Of three threads: torch's own kernels round otherwise on another number, and who draws what is chance."""
    threads(3)
    counts, begun = [], threading.Barrier(2, timeout=60)

    def before(batches):
        counts.append(torch.get_num_threads())
        if len(counts) <= 2:
            begun.wait()  # for the other thread

    with ahead(drawing(before), range(2)) as sets:
        next(sets)
        assert torch.get_num_threads() == 2  # of the caller, who uses the set
    assert set(counts) == {1}


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


class Linear(nn.Module):
    """A Teacher whose top class is seldom the class that an image was drawn for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.head, self.calls = nn.Linear(64, CLASSES), 0

    def forward(self, x):
        self.calls += 1
        return self.head(x.flatten(1))


@pytest.mark.parametrize("labels", ["soft", "top1", "class"])
def test_loss_of_the_first_step(labels, tmp_path):
    """Without augmentation the loss of a step on all images is that of the definition, in float64."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 8, 8, 1), generator=draw, dtype=torch.uint8)
    split = Split(images, torch.arange(COUNT) % CLASSES)
    config = RecycleConfig(**{**preset("toy"), **PLAIN, "out": str(tmp_path), "labels": labels})
    data = Dataset("made", tuple("abcd"), split, split, split)
    run = Context(config, tmp_path, state.current(), data, Journal(tmp_path))
    teacher, student = Linear().eval(), run.seeded("resnet8", 4, "student")
    z = copy.deepcopy(student).double().train()(to_float(images).double())
    with torch.no_grad():
        soft = teacher.head.double()(to_float(images).double().flatten(1))
    teacher.head.float()
    t, target = config.temperature, split.labels if labels == "class" else soft.argmax(1)
    divergence = F.kl_div((z / t).log_softmax(1), (soft / t).softmax(1), reduction="batchmean")
    expected = t * t * divergence if labels == "soft" else F.cross_entropy(z, target)
    assert not torch.equal(soft.argmax(1), split.labels)
    sets, schedule = (torch.arange(COUNT), split.labels, images), Schedule((1,), COUNT, 1)
    done = gkd.distil(run, teacher, student, lambda _: sets, schedule, confidence=0.0, seed=0)
    assert done.loss[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert teacher.calls == (0 if labels == "class" else 1)
