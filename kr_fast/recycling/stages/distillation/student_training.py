"""A Student's training on synthetic sets: schedule, batches with the Teacher's logits, loss, optimizer.

The loss of a mixed image (:mod:`kr_fast.recycling.stages.distillation.mixing`) is ``share`` of that with label and
weight of image i, and ``1 - share`` of that with those of image j. For soft labels the Teacher is asked on the mixed
image itself (function matching: Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent",
CVPR 2022), for its top class on each of the two.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kr_fast.data import AugmentParams, Split, augmented, to_float
from kr_fast.ensemble.networks import answer
from kr_fast.ensemble.training.recipe import make_optimizer
from kr_fast.ops.distillation.distillation_loss import distillation_loss
from kr_fast.ops.distillation.dkd_loss import dkd_loss
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages.distillation.mixing import Mixture, draw_mixtures
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage.image_rows import batches
from kr_fast.training.precision import autocast

HARD = {"soft_weight": 0.0, "hard_weight": 1.0}  # the cross-entropy with one class
MAX_GRAD_NORM = 5.0  # T^2 times the divergence has large gradients at the start
# Images that are augmented and shown to the Teacher at a time: more are slower, as their activations leave the cache.
PREPARED, PREPARED_BYTES = 256, 8 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a Student trains: ``cycles`` one-cycle schedules one after the other, each of so many periods.

    Each but the first is a warm restart (Loshchilov and Hutter, "SGDR", ICLR 2017), so training can end after any.
    """

    cycles: tuple[int, ...]
    images: int
    epochs: int

    @property
    def periods(self) -> int:
        """Periods of all cycles."""
        return sum(self.cycles)

    def cycle(self, period: int) -> tuple[int, int]:
        """(first period, periods) of the cycle that ``period`` is in."""
        first = 0
        for count in self.cycles:
            if period < first + count:
                break
            first += count
        return first, count

    def resized(self, images: int, passes: int, batch: int) -> "Schedule":
        """One cycle of about as many steps of ``batch`` images, on sets of another size; 0 for as many as here.

        A set on which one period would take more steps than that has fewer images.
        """
        if not images and not passes:
            return self
        steps = self.periods * self.epochs * max(self.images // batch, 1)
        passes = min(passes or self.epochs, steps)
        images = min(images or self.images, steps // passes * batch)
        return Schedule((max(round(steps / (passes * max(images // batch, 1))), 1),), images, passes)


class Batch(NamedTuple):
    """Of a step: indices of its images, these augmented and mixed, the Teacher's logits (of the mixed images for soft
    labels, of the images before that for top classes, None for class labels) and the mixture.
    """

    index: Tensor
    x: Tensor
    teacher: Tensor | None
    mix: Mixture | None


class StudentTraining:
    """A Student's optimizer and schedule, and its training for a period."""

    def __init__(self, context: Context, teacher_model: nn.Module, student: nn.Module, schedule: Schedule, seed: int):
        self.config, self.recipe = context.config, context.config.recipe("student")
        self.device, self.precision = context.runtime.device, context.precision.classifiers
        self.teacher_model, self.student, self.schedule, self.seed = teacher_model, student, schedule, seed
        self.batch = min(self.recipe.batch_size, schedule.images)
        self.per_epoch = schedule.images // self.batch
        self.images, self.seconds = 0, 0.0  # that this process has trained on
        self._begin_cycle(0)

    def _begin_cycle(self, period: int) -> None:
        steps = self.schedule.cycle(period)[1] * self.schedule.epochs * self.per_epoch
        self.optimizer, self.rate = make_optimizer(self.student, self.recipe, steps, MAX_GRAD_NORM)

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` continues from."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self._begin_cycle(state["period"] - 1)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"student": self.student, "optimizer": self.optimizer, "rate": self.rate}

    def period(self, period: int, synthetic: Split, weight: Tensor) -> float:
        """Train on the set of ``period``; returns the mean loss of its steps."""
        if period and self.schedule.cycle(period)[0] == period:
            self._begin_cycle(period)
        self.student.train()
        start = time.perf_counter()
        total = torch.zeros((), device=synthetic.labels.device)
        for epoch in range(self.schedule.epochs):
            for batch in self._batches(synthetic, period, epoch):
                loss = self._loss(batch, synthetic.labels[batch.index], weight[batch.index])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if self.optimizer.skipped:
                    got = f"{float(loss.detach())} with gradients of norm {self.optimizer.grad_norm} in period {period}"
                    raise UserError(f"run: distillation loss must be finite, got {got}")
                self.rate.step()
                total += loss.detach()
        self.student.eval()
        mean = float(total) / (self.schedule.epochs * self.per_epoch)  # of a GPU it waits for all of its steps
        self.images += self.schedule.epochs * self.per_epoch * self.batch
        self.seconds += time.perf_counter() - start
        return mean

    def _batches(self, synthetic: Split, period: int, epoch: int) -> Iterator[Batch]:
        """The batch of each step of an epoch.

        Many steps are prepared at a time: the Teacher is faster on more images than a step has.
        """
        c, (height, width, channels) = self.config, synthetic.images.shape[1:]
        names = ("gkd", period, epoch)
        random = seeds.generator(self.seed, *names)
        order = torch.randperm(len(synthetic), generator=random).to(synthetic.labels.device)
        mixes = draw_mixtures(
            c.student_mixup, c.student_cutmix, self.per_epoch, (height, width), self.seed, "mixtures", *names
        )
        most = min(PREPARED, PREPARED_BYTES // (4 * channels * height * width))
        steps = max(most // self.batch, 1)
        for first in range(0, self.per_epoch, steps):
            mix = mixes[first : first + steps]
            part = order[first * self.batch : (first + len(mix)) * self.batch]
            draw = [self.recipe.augment.draw(self.batch, (height, width), random) for _ in mix]
            x = augmented(synthetic.images, part, AugmentParams.cat(draw).to(part.device))
            teacher: tuple[Tensor | None, ...] = (None,) * len(mix)  # which class labels do not need
            if c.labels == "top1":
                teacher = self._answers(x)
            if mix[0] is not None:
                x = torch.cat([each.images(images) for each, images in zip(mix, x.split(self.batch), strict=True)])
            if c.labels == "soft":
                teacher = self._answers(x)
            yield from map(Batch, part.split(self.batch), x.split(self.batch), teacher, mix)

    @torch.no_grad()
    def _answers(self, x: Tensor) -> tuple[Tensor, ...]:
        """The Teacher's logits, batch by batch."""
        return answer("run", "teacher", self.teacher_model, x).split(self.batch)

    def _loss(self, batch: Batch, labels: Tensor, weight: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            logits = self.student(batch.x).float()
        teacher = logits.detach() if batch.teacher is None else batch.teacher
        labels = teacher.argmax(1) if self.config.labels == "top1" else labels
        if (mix := batch.mix) is None:
            return self._loss_with(logits, teacher, labels, weight)
        own = self._loss_with(logits, teacher, labels, weight)
        other = self._loss_with(logits, teacher, labels.flip(0), weight.flip(0))
        return mix.share * own + (1 - mix.share) * other  # both are divided by the sum of the same weights

    def _loss_with(self, logits: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """The mean loss of images with these ``labels`` and weights, beside the Teacher's logits."""
        c = self.config
        if c.labels != "soft":
            return distillation_loss(logits, teacher, labels, **HARD, sample_weight=weight)
        options = {"temperature": c.temperature, "hard_weight": c.hard_weight, "standardize": c.standardize_logits}
        if c.loss == "dkd":
            options |= {"alpha": c.dkd_alpha, "beta": c.dkd_beta}
            return dkd_loss(logits, teacher, labels, **options, sample_weight=weight)
        return distillation_loss(logits, teacher, labels, soft_weight=c.soft_weight, **options, sample_weight=weight)


@torch.inference_mode()
def confident(teacher_model: nn.Module, images: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """bool ``[N]``: the Teacher gives the image's label at least this probability; others get weight 0."""
    if threshold == 0:
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    asked = (answer("run", "teacher", teacher_model, to_float(part)) for part in batches(images, 1024))
    parts = [logits.float().softmax(1) for logits in asked]
    return torch.cat(parts).gather(1, labels[:, None])[:, 0] >= threshold
