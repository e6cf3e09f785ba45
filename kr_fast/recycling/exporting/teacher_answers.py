"""What a Student was taught of each synthetic image: the Teacher's soft labels, its top class, or nothing."""

from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.networks import answer
from kr_fast.models import classifier
from kr_fast.recycling.exporting.finished_run import FinishedRun
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.given_teacher import given_teacher
from kr_fast.runtime import state
from kr_fast.synthesis.output.sinks import Column

ASKED = 256  # images at a time


def of_images(run: FinishedRun, images: Tensor) -> dict[Column, Tensor]:
    """The column of a set's Teacher answers, for the run's option ``labels``: at most what a Student was shown.

    ``soft``: ``soft_label``, ``softmax(z / T)`` with the run's temperature, of logits that are standardised first where
    the run's loss did so; ``top1``: ``teacher_label``, the class of the largest logit; ``class``: no column, as the
    Teacher was not asked. The Teacher is asked on the image itself, as a Student is without augmentation.

    Args:
        images: uint8 ``[N, H, W, C]``.
    """
    config, classes = run.config, run.metrics["dataset"]["num_classes"]
    labels = config.get("labels", "soft")
    if labels == "class":
        return {}
    z = _logits(run, images)
    if labels == "top1":
        return {Column("teacher_label"): z.argmax(1)}
    if config.get("standardize_logits"):
        z = (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)  # as kr_fast.distillation_loss does
    return {Column("soft_label", classes): (z / config["temperature"]).softmax(1).float()}


@torch.no_grad()
def _logits(run: FinishedRun, images: Tensor) -> Tensor:
    """The Teacher's logits, float64 ``[N, K]`` on the CPU."""
    model, device = _network(run, images), state.current().device
    load_weights(model, run.folder.teacher, "export: teacher")
    model = model.to(device).eval()
    parts = images.split(ASKED)
    return torch.cat([answer("export", "teacher", model, to_float(part.to(device))).double().cpu() for part in parts])


def _network(run: FinishedRun, images: Tensor) -> nn.Module:
    data, config = run.metrics["dataset"], run.config
    shape = (data["height"], data["width"], data["channels"])
    arch, width, factory = config["teacher_arch"], config["teacher_width"], ""
    if ":" in run.teacher or (run.teacher and Path(run.teacher).is_dir()):  # the weights of a file are in the run
        factory = given_teacher(run.teacher, arch, width).factory
    if factory:
        sample = to_float(images[: teacher.ASKED])
        return teacher.from_factory("export", factory, sample, data["num_classes"], shape)
    options = {"num_classes": data["num_classes"], "in_channels": shape[2], "width": width}
    return classifier(arch, **options, image_size=max(shape[:2]))
