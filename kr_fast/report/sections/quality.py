"""How good Teacher and Student classify real test images, and how near synthetic images are to them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.tables import interval, number, percent

MODELS = ("teacher", "student")
FIGURES = {
    "auc": "test AUC (mean over classes, each against the rest)",
    "balanced_accuracy": "test balanced accuracy (mean recall)",
    "ece": "calibration error (15 bins)",
}


def rows(summary: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Rows beside the test accuracy, of the models of the columns ``names``; none of figures that were not measured."""
    table, gaps = [], summary.get("student_minus_teacher") or {}
    for key, title in FIGURES.items():
        if summary["teacher"].get(f"test_{key}") is None:
            continue
        cells = [_cell(summary["teacher" if name == "teacher" else "student"], f"test_{key}") for name in names]
        low, high = gaps[key]["interval"]
        gap = f"{-gaps[key]['difference']:+.4f} {interval([-high, -low], 4)}"
        table.append([title, *cells, gap])
    return table


def _cell(row: Mapping[str, Any], key: str) -> str:
    return f"{number(row[key], 4)} {interval(row[f'{key}_ci'], 4)}"


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """Recall by class, accuracy without near-duplicates, and the figures of synthetic images, where measured."""
    if summary["teacher"].get("test_recall"):
        yield "heading", "Classes of the test images"
        yield "text", _classes(summary)
        yield "table", _recalls(summary)
    if summary["teacher"].get("test_without_duplicates"):
        yield "heading", "Test images without near-duplicates in training"
        yield "text", _apart(summary)
    if summary.get("synthetic"):
        yield "heading", "Quality of the synthetic images"
        yield "table", _generated(summary["synthetic"])
        yield "text", _explanation(summary["synthetic"])


def _classes(summary: Mapping[str, Any]) -> str:
    absent = summary["teacher"]["test_absent_classes"]
    words = "Recall: the share of a class's test images that is classified correctly."
    if not absent:
        return words
    named = ", ".join(summary["dataset"]["class_names"][index] for index in absent)
    return f"{words} Without test images, and in no mean: {named}."


def _recalls(summary: Mapping[str, Any]) -> list[list[str]]:
    table = [["class", "Teacher", "Student"]]
    recalls = (summary[model]["test_recall"] for model in MODELS)
    for name, *values in zip(summary["dataset"]["class_names"], *recalls, strict=True):
        table.append([name, *(percent(value) for value in values)])
    return table


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


def _generated(figures: Mapping[str, Any]) -> list[list[str]]:
    table = [["", "synthetic images", "training images"]]
    pair = (figures, figures["real"])
    kids = (f"{number(each['kid']['mean'], 4)} (sd {number(each['kid']['sd'], 4)})" for each in pair)
    table.append(["KID, 0 for the same distribution", *kids])
    names = ("precision", "recall", "density", "coverage")
    return [*table, *([name, *(number(each[name]) for each in pair)] for name in names)]


def _explanation(figures: Mapping[str, Any]) -> str:
    kid = figures["kid"]
    return (
        f"{figures['images']:,} synthetic images of the last period, and as many training images beside them, against "
        f"{figures['test_images']:,} real test images, in the {figures['features']} features that the Teacher's last "
        f"layer reads. KID: mean over {kid['subsets']} subsets of {kid['subset_size']} images, with their standard "
        "deviation. Precision and recall: share of synthetic images among the real ones, and the other way round (3 "
        "neighbours); density and coverage are their counterparts that outliers move less (5 neighbours). The Teacher "
        "was trained on the training images, so their column is no figure of images that are new to it. Compare only "
        "figures of one Teacher and equally many images."
    )
