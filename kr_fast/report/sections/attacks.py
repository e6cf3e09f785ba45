"""Every attack on every model: the recipes, each target, and the paired tests."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import audit_tables as tables
from kr_fast.report import sentences
from kr_fast.report.render import Block, Figures, figure

Audit = Mapping[str, Any]
Labels = Mapping[str, str] | None


def recipes(audit: Audit, labels: Labels) -> Iterator[Block]:
    """Each set of shadows, every one of which was attacked from the others."""
    for name in audit["leave_one_out"]:
        yield "heading", f"Every shadow as a target: models {sentences.maker(audit, name, labels)}"
        yield "text", tables.RECIPES
        yield "table", tables.leave_one_out(audit, name)
        if rows := tables.recipes(audit, name):
            yield "text", "Mean AUC of the first set less that of this one, in pairs of models with the same members:"
            yield "table", rows


def targets(audit: Audit, labels: Labels, figures: Figures) -> Iterator[Block]:
    """Each target, the positive control last."""
    for name in tables.names(audit):
        yield from _target(audit, name, labels, figures)


def comparisons(audit: Audit, labels: Labels) -> Iterator[Block]:
    """The paired tests of the first target against each other one."""
    for other in audit["comparison"]:
        first = next(iter(audit["comparison"][other].values()))["first"]
        first, second = (sentences.target_title(audit, name, labels) for name in (first, other))
        yield "heading", f"{_heading(first)} against {second}"
        yield (
            "text",
            f"Paired test on the same examples: AUC on {first} minus AUC on {second}. The exploratory attacks "
            "share one error: their corrected p is Holm's, their corrected interval Bonferroni's.",
        )
        yield "table", tables.comparison(audit, other)


def _heading(label: str) -> str:
    """A title of this package starts a heading; the name that a user gave stays as it is."""
    return f"T{label[1:]}" if label.startswith("the ") else label


def _target(audit: Audit, name: str, labels: Labels, figures: Figures) -> Iterator[Block]:
    facts, label = audit["setting"]["targets"][name], sentences.target_title(audit, name, labels)
    start = "Released images: " if facts["kind"] == "released" else "Target: "
    yield "heading", _heading(label) if label.startswith("the ") else start + label
    yield "table", tables.attacks(audit, name)
    yield figure(f"roc {name}", figures)
    yield "table", tables.low_fpr(audit, name)
    yield (
        "text",
        "A TPR is taken at the largest realised FPR that is at most the stated one. Its interval covers the TPR at the "
        "threshold whose true FPR is the stated one; below 10 false positives only the interval is quoted.",
    )
    yield figure(f"scores {name}", figures)
    points = tables.operating_points(audit, name)
    if len(points) > 1:
        yield (
            "text",
            "Thresholds that never saw this target: chosen on the shadows, each attacked from the others. PPV is the "
            "share of members among the flagged (false positives in brackets).",
        )
        yield "table", points
    if audit["exposed"].get(name) and not facts["control"] and (audit["show_records"] or audit["show_real_images"]):
        yield "text", "The most exposed members, by the primary attack:"
        if f"exposed {name}" in figures:
            yield "figure", f"exposed {name}"
        if audit["show_records"]:
            yield "table", tables.exposed(audit, name)
