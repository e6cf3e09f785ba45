"""The choices on validation: Checkpoint Optimisation and Tuning, with every trial."""

from collections.abc import Iterator
from typing import Any

from kr_fast.report import tables
from kr_fast.report.render import Block, Figures, figure

HALVED = (
    " Successive halving: the better half of each round is tried again by Students that learn for twice as long "
    "(length, in units of the shortest), until one is left."
)


def blocks(summary: dict[str, Any], figures: Figures) -> Iterator[Block]:
    """Both sections."""
    for title, key in (("Checkpoint Optimisation", "checkpoints"), ("Tuning", "tuning")):
        yield "heading", title
        if not (rows := summary.get(key)):
            yield "missing", f"{title} was not run."
            continue
        by = "AUC" if "val_auc" in rows[0] else "Accuracy"
        halved = "round" in rows[0]
        yield "text", f"{by} of a short Student on real validation images.{HALVED if halved else ''}"
        yield "table", tables.trials(rows)
        if halved and key == "tuning":
            yield "text", decision(summary.get("tuning_decision"))
            yield figure("tuning", figures)


def decision(facts: dict[str, Any] | None) -> str:
    """Why the best setting, or the usual one, stays."""
    if facts is None:
        return "The configured setting was the best one."
    means = ", ".join(f"{name} {tables.number(facts[name], 4)}" for name in ("best", "usual"))
    words = "replaces the configured one" if facts["replaced"] else "does not replace the configured one"
    return (
        f"The best setting {words}: by {facts['repeats']} Students each of other seeds, mean score {means}; it has to "
        f"be better by more than a standard error of validation, {tables.number(facts['noise'], 4)}."
    )
