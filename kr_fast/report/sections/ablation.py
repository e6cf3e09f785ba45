"""The 2x2 ablation: what the Teacher's labels and new images bring a Student."""

from collections.abc import Iterator
from typing import Any

from kr_fast.report.audit_tables import averaged
from kr_fast.report.render import Block
from kr_fast.report.sections import quality
from kr_fast.report.tables import number, percent, share

LABELS = {"soft": "the Teacher's probabilities", "top1": "the Teacher's top classes", "class": "class labels"}
ATTACKS = {"lira": "LiRA online", "lira_offline": "LiRA offline", "rmia": "RMIA"}
IMAGES = {False: "one fixed set", True: "a new set each period"}


def blocks(summary: dict[str, Any]) -> Iterator[Block]:
    """The section, of a run with an ablation; nothing without.

    Args:
        summary: the run's; its ``ablation`` holds the rows of
            :func:`kr_fast.recycling.stages.distillation.ablation.run`.
    """
    if not (rows := summary.get("ablation")):
        return
    yield "heading", "Ablation: labels and images"
    yield (
        "text",
        "Four Students of the same first weights, shuffles, schedule and sampling. They differ in what they learn of "
        "an image and in whether its set is drawn again each period. The period of each was chosen on validation.",
    )
    yield "table", table(rows, summary["dataset"], by_groups=quality.by_groups(summary["teacher"]))
    yield "text", effects(rows)
    if "leakage" in rows[0]:
        yield (
            "text",
            "What each way leaks: the mean AUC over shadow Students that were trained in it, each attacked from the "
            "others. Both sets of them learn from the same shadow Teachers.",
        )
        yield "table", leakage(rows)


def table(rows: list[dict[str, Any]], dataset: dict[str, Any], *, by_groups: bool = False) -> list[list[str]]:
    """Accuracy on validation and test of each Student; with Wilson's interval, unless images are in groups."""
    cells = [["labels", "images", "validation accuracy", "test accuracy", "test AUC", ""]]
    for row in rows:
        values = {name: row[f"{name}_accuracy"] for name in ("val", "test")}
        of_splits = [percent(each) if by_groups else share(each, dataset[name]) for name, each in values.items()]
        own = "the Student of this run" if row["of_run"] else ""
        cells.append([LABELS[row["labels"]], IMAGES[row["regenerated"]], *of_splits, number(row["test_auc"]), own])
    return cells


def leakage(rows: list[dict[str, Any]]) -> list[list[str]]:
    """AUC of each attack over the shadow Students of each kind, or why there are none."""
    cells = [["labels", "images", *(f"AUC, {words}" for words in ATTACKS.values()), ""]]
    for row in rows:
        aucs = row["leakage"] or {}
        of_attacks = [averaged(aucs[name]) if name in aucs else "" for name in ATTACKS]
        cells.append([LABELS[row["labels"]], IMAGES[row["regenerated"]], *of_attacks, row["not_attacked"]])
    return cells


def effects(rows: list[dict[str, Any]]) -> str:
    """What each of the two brings in points of test accuracy, with either choice of the other."""
    tested = {(row["labels"] != "class", row["regenerated"]): row["test_accuracy"] for row in rows}
    of_labels = [_points(tested[True, new] - tested[False, new]) for new in (False, True)]
    of_images = [_points(tested[teacher, True] - tested[teacher, False]) for teacher in (False, True)]
    (labels,) = {row["labels"] for row in rows} - {"class"}
    return (
        f"In place of class labels, {LABELS[labels]} bring {of_labels[0]} points of test accuracy on a fixed set and "
        f"{of_labels[1]} on new ones. New images bring {of_images[0]} points with class labels and {of_images[1]} "
        f"otherwise; both together bring {_points(tested[True, True] - tested[False, False])}. These are single "
        "trainings: another seed changes them."
    )


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"
