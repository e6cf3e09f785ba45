"""The options of a Student's loss: value and gradient of a step against the definition in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_runs import new_context

from kr_fast.data import to_float
from kr_fast.recycling.stages.distillation import gkd, student_training
from kr_fast.recycling.stages.distillation.mixing import draw_mixtures
from kr_fast.recycling.stages.distillation.student_training import Schedule
from kr_fast.runtime import seeds

COUNT, CLASSES, SIDE = 32, 4, 8  # one batch
PLAIN = {"student_shift": 0, "student_flip": False, "student_rotate": 0.0, "student_scale": 0.0}
SEED, CONFIDENCE = 5, 0.22  # some images weigh 0


class Linear(nn.Module):
    """A Teacher whose top class is seldom the class that an image was drawn for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(SIDE * SIDE, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1))


def divergence(z, t, y, c):
    """Of each row, by the papers' equations."""
    hard = F.cross_entropy(z, y, reduction="none")
    if c.labels != "soft":
        return hard
    if c.standardize_logits:
        z, t = ((each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True) for each in (z, t))
    log_q, log_p = (z / c.temperature).log_softmax(1), (t / c.temperature).log_softmax(1)
    rows = c.soft_weight * (log_p.exp() * (log_p - log_q)).sum(1)
    if c.loss == "dkd":
        of_label = F.one_hot(y, CLASSES).bool()
        q, p = (each.exp()[of_label] for each in (log_q, log_p))
        target = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        log_q, log_p = ((each / c.temperature)[~of_label].view(len(z), -1).log_softmax(1) for each in (z, t))
        rows = c.dkd_alpha * target + c.dkd_beta * (log_p.exp() * (log_p - log_q)).sum(1)
    return c.temperature**2 * rows + c.hard_weight * hard


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "dkd", "dkd_beta": 2.0, "hard_weight": 0.3},
        {"standardize_logits": True, "temperature": 2.0, "hard_weight": 0.3},
        {"student_mixup": 1.0, "hard_weight": 0.3},
        {"student_cutmix": 1.0, "loss": "dkd", "standardize_logits": True},
        {"student_mixup": 1.0, "labels": "top1"},
        {"student_cutmix": 1.0, "labels": "class"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_loss_and_gradient_of_a_step(options, tmp_path):
    run = new_context(tmp_path, (COUNT, 8, 8), CLASSES, SIDE, **PLAIN, **options)
    c, images, labels = run.config, run.data.train.images, run.data.train.labels
    teacher, student = Linear().eval(), run.seeded("resnet8", 4, "student")
    exact, exact_teacher = copy.deepcopy(student).double().train(), copy.deepcopy(teacher).double()

    order = torch.randperm(COUNT, generator=seeds.generator(SEED, "gkd", 0, 0))
    x, y = to_float(images[order]).double(), labels[order]
    confident = exact_teacher(x).softmax(1)[torch.arange(COUNT), y] >= CONFIDENCE
    assert 0 < confident.sum() < COUNT
    pairs = [(1.0, y, confident.double())]
    names = ("mixtures", "gkd", 0, 0)
    (mixture,) = draw_mixtures(c.student_mixup, c.student_cutmix, 1, (SIDE, SIDE), SEED, *names)
    top = exact_teacher(x).argmax(1) if c.labels == "top1" else y
    if mixture is not None:
        assert 0.02 < mixture.share < 0.98
        x = mixture.images(x)
        pairs = [(mixture.share, top, pairs[0][2]), (1 - mixture.share, top.flip(0), pairs[0][2].flip(0))]
    z, t = exact(x), exact_teacher(x).detach()
    expected = sum(share * (weight * divergence(z, t, of, c)).sum() / weight.sum() for share, of, weight in pairs)
    expected.backward()

    sets = torch.arange(COUNT), labels, images
    done = gkd.distil(run, teacher, student, lambda _: sets, Schedule((1,), COUNT, 1), confidence=CONFIDENCE, seed=SEED)
    assert done.loss[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, result), (_, weights) in zip(student.named_parameters(), exact.named_parameters(), strict=True):
        scale = float(weights.grad.abs().max())
        torch.testing.assert_close(result.grad.double(), weights.grad, rtol=0, atol=2e-4 * scale + 1e-6, msg=name)


def test_result_does_not_depend_on_how_many_steps_are_prepared(tmp_path, monkeypatch):
    """One step at a time, three and the rest, or all: the same mixtures and augmentation; the Teacher's answers of more
    images differ in their last bits at most."""
    options = {"student_mixup": 1.0, "student_cutmix": 1.0, "student_batch_size": 8}
    run = new_context(tmp_path, (COUNT, 8, 8), CLASSES, SIDE, **options)
    sets = torch.arange(COUNT), run.data.train.labels, run.data.train.images
    losses = []
    for prepared in (8, 24, 256):
        monkeypatch.setattr(student_training, "PREPARED", prepared)
        student = run.seeded("resnet8", 4, "student")
        done = gkd.distil(run, Linear().eval(), student, lambda _: sets, Schedule((2,), COUNT, 2), confidence=0, seed=1)
        losses.append(done.loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
