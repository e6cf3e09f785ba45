"""The report of an audit as one page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.report import audit_plots, render
from kr_fast.report import audit_tables as tables
from kr_fast.report.private import banner
from kr_fast.report.render import Block, Figures, figure
from kr_fast.report.sections import canaries


def write_audit(
    out: Path,
    audit: dict[str, Any],
    lines: dict[str, dict[str, dict[str, np.ndarray]]],
    scores: dict[str, dict[str, np.ndarray]],
    members: np.ndarray | None,
    images: np.ndarray | None = None,
    show_records: bool = False,
) -> Path:
    """Write ``audit.html`` into ``out``.

    Args:
        audit: what ``audit.json`` holds: figures by target and attack, comparison, leave_one_out, records, setting,
            exposed, details (title, command, versions, config).
        lines: target -> attack -> fpr, tpr, and low and high of the TPR on a grid of FPR.
        scores: target -> attack -> ``[N]``.
        members: bool ``[N]``, or None without targets.
        images: uint8 ``[N, H, W, C]``, where real images may be shown, or None.
        show_records: whether the index, class and score of the most exposed members may be shown.

    A page that shows real images or records says so in a banner.
    """
    audit = {**audit, "show_records": show_records, "show_real_images": images is not None}
    figures = audit_plots.all_figures(audit, lines, scores, members, images)
    title = audit["details"].get("title") or "Membership audit"
    return render.write_html(out / "audit.html", title, blocks(audit, figures), figures)


def blocks(audit: dict[str, Any], figures: Figures) -> Iterator[Block]:
    """The sections, in the order in which a reader wants them."""
    setting = audit["setting"]
    level = tables.percent_of_level(setting["level"])
    if words := banner(audit["show_real_images"], audit["show_records"]):
        yield "banner", words
    labels = audit["details"].get("labels")
    yield "text", tables.verdict(audit, labels)
    if setting["targets"] or audit["leave_one_out"]:
        yield "table", tables.headline(audit, labels)
        yield "text", f"Intervals are {level}: score intervals of AUC; those of a TPR account for the chosen threshold."
    yield "heading", "What these figures do not say"
    yield "note", tables.caveats(audit)
    if rows := tables.negative_controls(audit):
        yield "heading", "Negative controls"
        yield "text", "Attacks that must not succeed. Where one does, the two sides differ without any leakage."
        yield "table", rows
    yield from canaries.blocks(audit)
    if setting["targets"]:
        yield "heading", "All attacks"
        yield figure("intervals", figures)
    for name in audit["leave_one_out"]:
        yield "heading", f"Every shadow as a target: {name}"
        yield "text", tables.RECIPES
        yield "table", tables.leave_one_out(audit, name)
        if rows := tables.recipes(audit, name):
            yield "text", "Mean AUC of the first set less that of this one, in pairs of models with the same members:"
            yield "table", rows
    for name in audit["records"]:
        yield "heading", tables.records_title(audit, name, labels)
        yield "text", tables.records_words(audit, name)
        for rows in tables.records(audit, name):
            yield "table", rows
    for name in tables.names(audit):
        yield from _target(audit, name, figures)
    for other in audit["comparison"]:
        first = next(iter(audit["comparison"][other].values()))["first"]
        yield "heading", f"{first} against {other}"
        yield (
            "text",
            f"Paired test on the same examples: AUC on {first} minus AUC on {other}. The exploratory attacks "
            "share one error: their corrected p is Holm's, their corrected interval Bonferroni's.",
        )
        yield "table", tables.comparison(audit, other)
    yield "heading", "What was run"
    members = "" if setting["members"] is None else f"{setting['members']} members, {setting['non_members']} others; "
    yield "text", f"{members}queries: {setting['augment']}; delta of the epsilon bounds: {setting['delta']:g}."
    if setting["targets"]:
        yield "table", tables.targets(audit)
    yield "table", tables.assumptions(audit)
    if words := tables.rmia(audit):
        yield "text", words
    if setting["skipped"]:
        words = "; ".join(f"{name} (needs {lacks})" for name, lacks in setting["skipped"].items())
        yield "text", f"Not run for lack of something: {words}."
    if skipped := tables.leave_one_out_skipped(audit):
        yield (
            "text",
            "By these attacks no shadow was attacked from the others, so they have no thresholds from shadows:",
        )
        yield "table", skipped
    details = audit["details"]
    if details.get("command"):
        yield "code", details["command"]
    if details.get("versions"):
        yield "table", [["package", "version"], *([key, value] for key, value in details["versions"].items())]
    if details.get("config"):
        yield "code", json.dumps(details["config"], indent=1)


def _target(audit: dict[str, Any], name: str, figures: Figures) -> Iterator[Block]:
    facts = audit["setting"]["targets"][name]
    start = "Released images" if facts["kind"] == "released" else "Target"
    yield "heading", "Positive control" if facts["control"] else f"{start}: {name}"
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
