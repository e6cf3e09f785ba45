"""How good Teacher and Student classify real test images, and how near synthetic images are to them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.tables import interval, number, percent, share

MODELS = ("teacher", "student")
FIGURES = {
    "auc": "test AUC (mean over classes, each against the rest)",
    "balanced_accuracy": "test balanced accuracy (mean recall)",
    "ece": "calibration error (15 bins)",
    "kappa": "quadratic weighted kappa of the grades",
}
OF_SETS = {
    "fid": "FID (Frechet distance)",
    "kid": "KID, 0 for the same distribution",
    **{name: name for name in ("precision", "recall", "density", "coverage")},
}
FEW_GROUPS = 20
SHARES = "In brackets: the interval of their share of the class, in %."
# Figures of a class, by their key: title, and how they are written.
OF_CLASSES = {
    "test_recall": ("sensitivity (recall)", percent),
    "test_precision": ("precision", percent),
    "test_class_auc": ("AUC", number),
    "test_class_ece": ("calibration error", number),
}


def by_groups(row: Mapping[str, Any]) -> bool:
    """Whether the intervals of a model's test figures are by whole groups of images."""
    return bool((row.get("test_groups") or {}).get("resampled"))


def accuracy(row: Mapping[str, Any], count: int) -> str:
    """Test accuracy with Wilson's interval, which counts images, or that by groups of them."""
    if not by_groups(row):
        return share(row.get("test_accuracy"), count)
    low, high = row["test_accuracy_ci"]
    return f"{percent(row['test_accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"


def intervals(summary: Mapping[str, Any]) -> str:
    """Of what kind the intervals of figures on test images are."""
    if by_groups(summary["teacher"]):
        return "bootstrap over groups of test images for figures on them"
    return "Wilson for accuracies, bootstrap over test images for the other figures on them"


def rows(summary: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Rows beside the test accuracy, of the models of the columns ``names``; none of figures that were not measured."""
    table, gaps = [], summary.get("student_minus_teacher") or {}
    for key, title in FIGURES.items():
        if summary["teacher"].get(f"test_{key}") is None:
            continue
        cells = [_cell(summary["teacher" if name == "teacher" else "student"], f"test_{key}") for name in names]
        table.append([title, *cells, _gap(gaps[key]) if key in gaps else ""])
    return table


def _gap(row: Mapping[str, Any]) -> str:
    """Of the Teacher less the Student."""
    low, high = row["interval"]
    return f"{0 - row['difference']:+.4f} {interval([0 - high, 0 - low], 4)}"  # no -0.0


def _cell(row: Mapping[str, Any], key: str) -> str:
    return f"{number(row[key], 4)} {interval(row[f'{key}_ci'], 4)}".rstrip()


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """Figures by class, accuracy without near-duplicates, and the figures of synthetic images, where measured."""
    if summary["teacher"].get("test_recall"):
        yield "heading", "Classes of the test images"
        yield "text", _classes(summary)
        yield "table", _by_class(summary)
        for model in MODELS:
            if summary[model].get("test_confusion"):
                yield "text", f"{model.capitalize()}: images of each class (row) by prediction. {SHARES}"
                yield "table", _confusion(summary, model)
    if summary["teacher"].get("test_groups"):
        yield "heading", "Groups of the test images"
        yield "text", _groups(summary["teacher"]["test_groups"])
        if table := _by_group(summary):
            yield "table", table
    if summary["teacher"].get("test_without_duplicates"):
        yield "heading", "Test images without near-duplicates in training"
        yield "text", _apart(summary)
    if summary.get("synthetic"):
        yield "heading", "Quality of the synthetic images"
        yield from generated(summary)


def _classes(summary: Mapping[str, Any]) -> str:
    absent = summary["teacher"]["test_absent_classes"]
    words = ["Sensitivity: the share of a class's test images that is classified correctly."]
    if summary["teacher"].get("test_precision"):
        words.append(
            "Precision: that share of the images that are predicted to be of it. AUC: of the class against the others. "
            "Calibration error: between the class's probability and its share of the images (15 bins). Intervals are "
            "bootstrap ones: of no width where every resampling has the same value, as where all images are right."
        )
    if absent:
        named = ", ".join(summary["dataset"]["class_names"][index] for index in absent)
        words.append(f"Without test images, and in no mean: {named}.")
    return " ".join(words)


def _by_class(summary: Mapping[str, Any]) -> list[list[str]]:
    keys = [key for key in OF_CLASSES if summary["teacher"].get(key)]
    table = [["class", "model", *(OF_CLASSES[key][0] for key in keys)]]
    for index, name in enumerate(summary["dataset"]["class_names"]):
        for model in MODELS:
            row = summary[model]
            table.append([name, model.capitalize(), *(_of_class(row, key, index) for key in keys)])
    return table


def _of_class(row: Mapping[str, Any], key: str, index: int) -> str:
    value, intervals = row[key][index], row.get(f"{key}_ci")
    written = OF_CLASSES[key][1](value)
    if value is None or intervals is None:
        return written
    of_percent = OF_CLASSES[key][1] is percent
    ends = [100 * end if of_percent else end for end in intervals[index]]
    return f"{written} {interval(ends, 1 if of_percent else 3)}"


def _confusion(summary: Mapping[str, Any], model: str) -> list[list[str]]:
    names, row = summary["dataset"]["class_names"], summary[model]
    table = [["", *names]]
    for name, counts, intervals in zip(names, row["test_confusion"], row["test_confusion_ci"], strict=True):
        cells = [str(count) for count in counts]
        for index, pair in enumerate(intervals or ()):
            if counts[index]:
                cells[index] += f" {interval([100 * end for end in pair], 0)}"
        table.append([name, *cells])
    return table


def _groups(facts: Mapping[str, Any]) -> str:
    count = facts["groups"]
    if not facts["resampled"]:
        return "All test images are of one group: intervals are over images, as if these were independent."
    few = " Of so few they are too narrow." if count < FEW_GROUPS else ""
    largest = " The largest groups, without their name and with intervals over their own images:"
    return (
        f"The test images are of {count:,} groups, such as patients or sites. Intervals of all test figures are those "
        f"of {count:,} groups drawn anew, each with all of its images."
        f"{few}{largest if facts['rows'] else ''}"
    )


def _by_group(summary: Mapping[str, Any]) -> list[list[str]]:
    """Empty where no group is large enough."""
    groups = [summary[model]["test_groups"]["rows"] for model in MODELS]
    names = [name for name in ("accuracy", *FIGURES) if groups[0] and name in groups[0][0]]
    table = [["test images", "model", *(FIGURES.get(name, name) for name in names)]]
    for rows in zip(*groups, strict=True):
        for model, row in zip(MODELS, rows, strict=True):
            cells = (f"{number(row[name])} {interval(row[f'{name}_ci'])}".rstrip() for name in names)
            table.append([f"{row['images']:,}", model.capitalize(), *cells])
    return table if groups[0] else []


def _apart(summary: Mapping[str, Any]) -> str:
    left = summary["teacher"]["test_without_duplicates"]["images"]
    out = summary["dataset"]["test"] - left
    each = []
    for model in MODELS:
        row = summary[model]["test_without_duplicates"]
        each.append(f"{model.capitalize()} {percent(row['accuracy'])}, AUC {number(row['auc'])}")
    return (
        f"{out:,} of {summary['dataset']['test']:,} test images have a near-duplicate among training or validation "
        f"images. On the other {left:,}: {'; '.join(each)}."
    )


def generated(summary: Mapping[str, Any]) -> Iterator[Block]:
    """Figures of generated images beside real test images, all and by class."""
    figures = summary["synthetic"]
    yield "table", set_table(figures)
    yield "text", _explanation(figures, given=bool(summary["config"].get("teacher")))
    if "classes" in figures:
        yield "table", _sets_by_class(figures["classes"], summary["dataset"]["class_names"])


def set_table(figures: Mapping[str, Any]) -> list[list[str]]:
    """Figures of all generated images, and of as many training images, beside real test images."""
    sides = {"synthetic": figures, "training": figures["real"]}
    table = [["", *(f"{name} images" for name in sides)]]
    for key, title in OF_SETS.items():
        if key in figures:
            table.append([title, *(_of_set(each, key) for each in sides.values())])
    return table


def _of_set(figures: Mapping[str, Any], key: str) -> str:
    if key == "kid" and isinstance(figures[key], Mapping):
        kid = figures[key]
        if "all" not in kid:  # of a run of an earlier version
            return f"{number(kid['mean'], 4)} (sd {number(kid['sd'], 4)})"
        return f"{number(kid['all'], 4)} {interval(kid['all_ci'], 4)}"
    digits = 4 if key == "kid" else 3
    return f"{number(figures[key], digits)} {interval(figures.get(f'{key}_ci'), digits)}".rstrip()


def _sets_by_class(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    table = [["class", "images", "of", *(key.upper() if key in ("fid", "kid") else key for key in OF_SETS)]]
    for name, row in zip(names, rows, strict=True):
        count = f"{row['images']:,} against {row['test_images']:,}"
        if "real" not in row:
            table.append([name, count, "", *["too few images"] * len(OF_SETS)])
            continue
        for title, each in (("synthetic", row), ("training", row["real"])):
            table.append([name, count, title, *(_of_set(each, key) for key in OF_SETS)])
    return table


def _explanation(figures: Mapping[str, Any], given: bool) -> str:
    kid = figures["kid"]
    known = "The Teacher was trained on the training images, so"
    if given:
        known = "Where the Teacher, which was given, was trained on the training images,"
    subsets = "of all images at once" if "all" in kid else f"mean over {kid['subsets']} subsets, with their sd"
    return (
        f"{figures['images']:,} synthetic images of the last period, and as many training images beside them, against "
        f"{figures['test_images']:,} real test images, in the {figures['features']} features that the Teacher's last "
        f"layer reads. KID: {subsets}. FID is biased upwards, the more the fewer images there are; its interval is one "
        "of the distance without that bias, and there is none for fewer than two images per feature. Precision and "
        "recall: share of synthetic images among the real ones, and the other way round (3 neighbours); density and "
        f"coverage are their counterparts that outliers move less (5 neighbours). {known} their column is no figure of "
        "images that are new to it. Compare only figures of one Teacher and equally many images."
    )
