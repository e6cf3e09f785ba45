"""How good Teacher, Student and synthetic images are, by the real test images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ensemble.training.evaluation import logits_of
from kr_fast.membership.inputs.duplicates import duplicates_across
from kr_fast.membership.inputs.features import BATCH, last_features
from kr_fast.metrics import Evaluation, evaluate, kernel_distance, neighbourhood_figures
from kr_fast.metrics.generated import LEAST
from kr_fast.recycling.context import Context
from kr_fast.runtime import seeds

MOST = 10_000  # images of a side in the figures of synthetic images


def classification(context: Context, teacher_model: nn.Module, student: nn.Module) -> dict[str, Any]:
    """{"teacher", "student": figures, "student_minus_teacher": {figure: {"difference", "interval"}}}.

    Figures: "test_accuracy", "test_auc", "test_balanced_accuracy" and "test_ece" of :func:`kr_fast.metrics.evaluate`,
    each with its "_ci"; "test_recall" by class, "test_absent_classes", and "test_without_duplicates": {"images",
    "accuracy", "auc"} on the test images without a near-duplicate among training and validation images, None where all
    or none have one.
    """
    test = context.data.test
    apart = _without_duplicates(context)
    evaluations, rows = {}, {}
    for name, model in (("teacher", teacher_model), ("student", student)):
        logits = logits_of(model, test)
        evaluations[name] = evaluate(logits, test.labels, seed=seeds.derive(context.config.seed, "test figures"))
        rest = None if apart is None else evaluate(logits[apart], test.labels[apart], seed=0, replicates=1)
        rows[name] = {**_row(evaluations[name]), "test_without_duplicates": None}
        if rest is not None:
            few = {"accuracy": rest.values["accuracy"], "auc": rest.values["auc"]}
            rows[name]["test_without_duplicates"] = {"images": int(apart.sum()), **few}
    return {**rows, "student_minus_teacher": evaluations["student"].minus(evaluations["teacher"])}


def _row(evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in evaluation.values.items():
        row |= {f"test_{name}": value, f"test_{name}_ci": evaluation.interval(name)}
    return {**row, "test_recall": evaluation.recall, "test_absent_classes": evaluation.absent}


def _without_duplicates(context: Context) -> Tensor | None:
    """bool ``[N]``: the test images without a near-duplicate in the other splits; None if these are all or none."""
    data = context.data
    pool = torch.cat([data.train.images, data.val.images, data.test.images])
    outside = torch.zeros(len(pool), dtype=torch.bool)
    outside[-len(data.test) :] = True
    apart = ~duplicates_across(pool, ~outside).near[outside]
    return apart if bool(apart.any()) and not bool(apart.all()) else None


def synthetic(context: Context, teacher_model: nn.Module) -> dict[str, Any] | None:
    """How near the synthetic images of the last period are to real test images, in the Teacher's features.

    The test images are the real side, as no choice of the run was made by them and there are more of them than of
    validation images. "real" holds the same figures of as many training images: what images of the real distribution
    reach at these numbers. (The Teacher was trained on them, and draws them apart by class as it draws no others.)

    Returns: {"images" (generated), "test_images", "features" (their width), "kid", "precision", "recall", "density",
        "coverage", "real": the last five}; None where the Teacher does not end in a linear layer, or sides are of fewer
        than 6 images.
    """
    data, images = context.data, torch.from_numpy(np.load(context.folder.images))
    count = min(len(images), len(data.train), MOST)
    if min(count, len(data.test)) < LEAST:
        return None
    sides = {"test": data.test.images, "synthetic": images, "real": data.train.images}
    features: dict[str, Tensor] = {}
    for name, side in sides.items():
        size = min(len(side), MOST) if name == "test" else count
        chosen = torch.randperm(len(side), generator=seeds.generator(context.config.seed, "features", name))[:size]
        parts = (to_float(part.to(context.runtime.device)) for part in side[chosen].split(BATCH))
        if (found := last_features(teacher_model, parts)) is None:
            return None
        features[name] = found
    rows = {}
    for name in ("synthetic", "real"):
        pair, seed = (features["test"], features[name]), seeds.derive(context.config.seed, "kid", name)
        rows[name] = {"kid": kernel_distance(*pair, seed=seed), **neighbourhood_figures(*pair)}
    facts = {"images": count, "test_images": len(features["test"]), "features": features["test"].shape[1]}
    return {**facts, **rows["synthetic"], "real": rows["real"]}
