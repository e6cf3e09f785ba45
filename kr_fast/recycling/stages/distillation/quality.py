"""How good Teacher, Student and synthetic images are, by the real test images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.data import Split, to_float
from kr_fast.ensemble.training.evaluation import logits_of
from kr_fast.membership.audit.record_table import LEAST_GROUP
from kr_fast.membership.inputs.duplicates import duplicates_across
from kr_fast.membership.inputs.features import BATCH, last_features
from kr_fast.metrics import Evaluation, evaluate, kernel_distance, set_figures
from kr_fast.metrics.generated import LEAST
from kr_fast.recycling.context import Context
from kr_fast.runtime import seeds
from kr_fast.runtime.storage.image_rows import ImageRows, Images, batches, rows_of

MOST = 10_000  # images of a side in the figures of synthetic images
MOST_GROUPS = 20  # of which figures are told
OF_CLASSES = {"recall": "test_recall", "precision": "test_precision", "auc": "test_class_auc", "ece": "test_class_ece"}


def classification(context: Context, teacher_model: nn.Module, student: nn.Module) -> dict[str, Any]:
    """{"teacher", "student": figures, "student_minus_teacher": {figure: {"difference", "interval"}}}.

    Figures of :func:`kr_fast.metrics.evaluate`: "test_accuracy", "test_auc", "test_balanced_accuracy", "test_ece" and,
    of grades, "test_kappa"; by class "test_recall", "test_precision", "test_class_auc", "test_class_ece"; and
    "test_confusion" (None above 20 classes). Each has its "_ci", of the confusion matrix those of shares of a class.
    "test_absent_classes". "test_groups", None without groups: {"groups" (how many), "resampled" (whether intervals are
    by groups, of which there must be two), "rows" (as of all images, of the largest groups, without their number)}. And
    "test_without_duplicates": {"images", "accuracy", "auc"} on the test images without a near-duplicate among training
    and validation images, None where all or none have one.
    """
    test = context.data.test
    apart, resampled = _without_duplicates(context), test.groups is not None and len(test.groups.unique()) > 1
    evaluations, rows = {}, {}
    for name, model in (("teacher", teacher_model), ("student", student)):
        logits = logits_of(model, test)
        options = {"seed": seeds.derive(context.config.seed, "test figures"), "ordinal": context.config.ordinal}
        evaluations[name] = evaluate(logits, test.labels, **options, groups=test.groups if resampled else None)
        rest = None if apart is None else evaluate(logits[apart], test.labels[apart], seed=0, replicates=1)
        rows[name] = {**_row(evaluations[name]), "test_groups": None, "test_without_duplicates": None}
        if test.groups is not None:
            facts = {"groups": len(test.groups.unique()), "resampled": resampled}
            rows[name]["test_groups"] = {**facts, "rows": _by_group(logits, test, options)}
        if rest is not None:
            few = {"accuracy": rest.values["accuracy"], "auc": rest.values["auc"]}
            rows[name]["test_without_duplicates"] = {"images": int(apart.sum()), **few}
    return {**rows, "student_minus_teacher": evaluations["student"].minus(evaluations["teacher"])}


def _row(evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in evaluation.values.items():
        row |= {f"test_{name}": value, f"test_{name}_ci": evaluation.interval(name)}
    for name, key in OF_CLASSES.items():
        row |= {key: evaluation.classes[name], f"{key}_ci": evaluation.class_intervals(name)}
    intervals = evaluation.confusion_intervals()
    confusion = None if intervals is None else evaluation.confusion.tolist()
    return {
        **row,
        "test_confusion": confusion,
        "test_confusion_ci": intervals,
        "test_absent_classes": evaluation.absent,
    }


def _by_group(logits: Tensor, test: Split, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of the largest groups, with intervals over their images: what names no group may leave."""
    numbers, counts = test.groups.unique(return_counts=True)
    rows = []
    for index in counts.argsort(descending=True, stable=True)[:MOST_GROUPS].tolist():
        if counts[index] >= LEAST_GROUP:
            own = test.groups == numbers[index]
            evaluation = evaluate(logits[own], test.labels[own], **options)
            rows.append({"images": int(counts[index])})
            for name, value in evaluation.values.items():
                rows[-1] |= {name: value, f"{name}_ci": evaluation.interval(name)}
    return rows


def _without_duplicates(context: Context) -> Tensor | None:
    """bool ``[N]``: the test images without a near-duplicate in the other splits; None if these are all or none."""
    data = context.data
    pool = ImageRows(data.train.images, data.val.images, data.test.images)
    outside = torch.zeros(len(pool), dtype=torch.bool)
    outside[-len(data.test) :] = True
    apart = ~duplicates_across(pool, ~outside).near[outside]
    return apart if bool(apart.any()) and not bool(apart.all()) else None


def synthetic(context: Context, teacher_model: nn.Module) -> dict[str, Any] | None:
    """:func:`compare` the synthetic images of the last period with real ones."""
    paths = (context.folder.images, context.folder.labels)
    images, labels = (torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths)
    return compare(context, teacher_model, Split(images, labels))


def compare(context: Context, teacher_model: nn.Module, generated: Split) -> dict[str, Any] | None:
    """How near generated images are to real test images, all and by class, in the Teacher's features.

    The test images are the real side, as no choice of the run was made by them and there are more of them than of
    validation images. "real" holds the same figures of as many training images: what images of the real distribution
    reach at these numbers. (The Teacher was trained on them, and draws them apart by class as it draws no others.)

    Returns: {"images" (generated), "test_images", "features" (their width), the figures of
        :func:`kr_fast.metrics.set_figures`, "kid" being that of :func:`kr_fast.metrics.kernel_distance` with "all" and
        "all_ci", "real": the same, "classes": for each {"images", "test_images", the figures, "real"}, without figures
        where a side is of fewer than 6 images}; None where the Teacher does not end in a linear layer, or sides are of
        fewer than 6 images.
    """
    data, seed = context.data, context.config.seed
    count = min(len(generated), len(data.train), MOST)
    if min(count, len(data.test)) < LEAST:
        return None
    sides = {"test": data.test, "synthetic": generated, "real": data.train}
    features: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for name, side in sides.items():
        size = min(len(side), MOST) if name == "test" else count
        chosen = torch.randperm(len(side), generator=seeds.generator(seed, "features", name))[:size]
        if (read := features_of(context, teacher_model, rows_of(side.images, chosen))) is None:
            return None
        features[name], labels[name] = read, side.labels[chosen]
    rows = {}
    for name in ("synthetic", "real"):
        pair = (features["test"], features[name])
        figures = set_figures(*pair, seed=seed)
        whole = {"all": figures.pop("kid"), "all_ci": figures.pop("kid_ci")}
        rows[name] = {"kid": kernel_distance(*pair, seed=seeds.derive(seed, "kid", name)) | whole, **figures}
    facts = {"images": count, "test_images": len(features["test"]), "features": features["test"].shape[1]}
    classes = [_of_class(features, labels, index, seed) for index in range(data.num_classes)]
    return {**facts, **rows["synthetic"], "real": rows["real"], "classes": classes}


def features_of(context: Context, teacher_model: nn.Module, images: Images) -> Tensor | None:
    """Features of uint8 images by the Teacher; None where it does not end in a linear layer."""
    return last_features(teacher_model, (to_float(part.to(context.runtime.device)) for part in batches(images, BATCH)))


def _of_class(features: dict[str, Tensor], labels: dict[str, Tensor], index: int, seed: int) -> dict[str, Any]:
    own = {name: values[labels[name] == index] for name, values in features.items()}
    count = min(len(own["synthetic"]), len(own["real"]))
    row: dict[str, Any] = {"images": count, "test_images": len(own["test"])}
    if min(row.values()) >= LEAST:
        row |= set_figures(own["test"], own["synthetic"][:count], seed=seed)
        row["real"] = set_figures(own["test"], own["real"][:count], seed=seed)
    return row
