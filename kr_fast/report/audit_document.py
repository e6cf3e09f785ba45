"""The report of an audit as one page."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.report import audit_plots, render
from kr_fast.report import audit_tables as tables
from kr_fast.report.private import banner
from kr_fast.report.render import Block, Figures, figure
from kr_fast.report.sections import attacks, cards, measured, reading, released, verdict


def write_audit(
    out: Path,
    audit: dict[str, Any],
    lines: dict[str, dict[str, dict[str, np.ndarray]]],
    scores: dict[str, dict[str, np.ndarray]],
    members: np.ndarray | None,
    images: np.ndarray | None = None,
    show_records: bool = False,
    synthetic: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write ``audit.html`` into ``out``.

    Args:
        audit: what ``audit.json`` holds: figures by target and attack, comparison, leave_one_out, records, setting,
            verdict where there is one, exposed, details (title, command, versions, config).
        lines: target -> attack -> fpr, tpr, and low and high of the TPR on a grid of FPR.
        scores: target -> attack -> ``[N]``.
        members: bool ``[N]``, or None without targets.
        images: uint8 ``[N, H, W, C]``, where real images may be shown, or None.
        show_records: whether the index, class and score of the most exposed members may be shown.
        synthetic: released set -> uint8 ``[S, H, W, C]``, shown beside the members nearest to it with ``images``.

    A page that shows real images or records says so in a banner.
    """
    audit = {**audit, "show_records": show_records, "show_real_images": images is not None}
    figures = audit_plots.all_figures(audit, lines, scores, members, images)
    if images is not None:
        figures |= released.figures(audit, images, synthetic or {})
    title = audit["details"].get("title") or "Membership audit"
    return render.write_html(out / "audit.html", title, blocks(audit, figures), figures)


def blocks(audit: dict[str, Any], figures: Figures) -> Iterator[Block]:
    """The sections, in the order in which a reader wants them: what follows from the cards is folded."""
    labels, decided = audit["details"].get("labels"), audit.get("verdict")
    words = tables.verdict(audit, labels)
    if private := banner(audit["show_real_images"], audit["show_records"]):
        yield "banner", private
    yield verdict.block(decided, words)
    yield cards.of_audit(audit, labels, decided)
    yield from reading.blocks(audit, labels)
    yield "heading", "What these figures do not say"
    yield "note", tables.caveats(audit)
    yield "heading", "Details"
    yield from render.folded(_details(audit, words if decided else None, labels, figures))


def _details(
    audit: dict[str, Any], words: str | None, labels: Mapping[str, str] | None, figures: Figures
) -> Iterator[Block]:
    setting = audit["setting"]
    yield from verdict.rules(audit.get("verdict"))
    if setting["targets"] or audit["leave_one_out"]:
        level = tables.percent_of_level(setting["level"])
        yield "heading", "All targets side by side"
        if words:
            yield "text", words
        yield "table", tables.headline(audit, labels)
        yield (
            "text",
            f"Intervals are {level}: {tables.intervals(audit)} of AUC; those of a TPR account for the chosen "
            "threshold.",
        )
        if setting["targets"]:
            yield figure("intervals", figures)
    yield from measured.blocks(audit, labels, figures)
    yield from attacks.recipes(audit, labels)
    yield from attacks.targets(audit, labels, figures)
    yield from attacks.comparisons(audit, labels)
    yield "heading", "What was run"
    members = "" if setting["members"] is None else f"{setting['members']} members, {setting['non_members']} others; "
    yield "text", f"{members}queries: {setting['augment']}; delta of the epsilon bounds: {setting['delta']:g}."
    if setting["targets"]:
        yield "table", tables.targets(audit, labels)
    yield "table", tables.assumptions(audit)
    if said := tables.rmia(audit):
        yield "text", said
    if setting["skipped"]:
        said = "; ".join(f"{name} (needs {lacks})" for name, lacks in setting["skipped"].items())
        yield "text", f"Not run for lack of something: {said}."
    if skipped := tables.leave_one_out_skipped(audit, labels):
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
