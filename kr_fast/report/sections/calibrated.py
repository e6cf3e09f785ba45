"""The attack on the synthetic images that other pipelines' images calibrate."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.sentences import outcome
from kr_fast.report.tables import interval, number, tpr

IMAGES = {"all_periods": "of all periods", "last_period": "of the last period, which are released"}
ATTACKS = {
    "offline": "calibrated (LiRA offline)",
    "online": "calibrated (LiRA online)",
    "uncalibrated": "distance to the nearest image",
}


def blocks(audit: Mapping[str, Any]) -> Iterator[Block]:
    """The section, where shadow pipelines had generators of their own; nothing elsewhere.

    Args:
        audit: the dictionary of ``audit.json``; its ``released_calibrated`` holds the figures of
            :mod:`kr_fast.recycling.stages.distillation.nearest_images`.
    """
    if not (figures := audit.get("released_calibrated")):
        return
    yield "heading", "Synthetic images by those of other pipelines"
    yield "text", result(figures)
    yield "table", table(figures)
    yield "text", explanation(figures)


def result(figures: Mapping[str, Any]) -> str:
    """What the images leak to whoever repeats the pipeline, in plain words."""
    level, parts = f"{100 * figures['level']:g} %", []
    for name, words in IMAGES.items():
        row = figures[name]["offline"]
        parts.append(
            f"on the images {words}, it {outcome(row['auc_ci'])} (AUC {number(row['auc'])}, {level} interval "
            f"{interval(row['auc_ci'])})"
        )
    return f"The attack named beforehand is LiRA offline: {'; '.join(parts)}."


def table(figures: Mapping[str, Any]) -> list[list[str]]:
    """Each attack on the images of this run, and the mean over the shadow pipelines."""
    rows = [["images", "attack", "role", "AUC", "TPR at 1 % FPR", f"mean AUC of {figures['pipelines']} made alike"]]
    for name, words in IMAGES.items():
        for attack, title in ATTACKS.items():
            row = figures[name][attack]
            mean = row["recipe"]["auc"]
            averaged = f"{number(mean['mean'])} {interval(mean['interval'])}".rstrip()
            auc = f"{number(row['auc'])} {interval(row['auc_ci_corrected'])}"
            rows.append([words, title, row["role"], auc, tpr(row["tpr_at_fpr"]["0.01"]), averaged])
    return rows


def explanation(figures: Mapping[str, Any]) -> str:
    """What is compared with what."""
    rest = "Only the last period is released, so the figures on all periods bound what more images would leak. "
    if figures["all_periods"] == figures["last_period"]:  # one set for all of them
        rest = "Every period had the same images. "
    return (
        "Of each record the distance to the nearest synthetic image counts, compared with its distances to the images "
        f"of {figures['pipelines']} pipelines whose generators were trained on random halves of members and "
        "non-members: a plain image has something near it whoever was trained on it. "
        f"{rest}The exploratory rows share one error (Bonferroni)."
    )
