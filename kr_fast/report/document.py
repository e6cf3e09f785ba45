"""The report of a run: the same sections once as HTML and once as Markdown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kr_fast.report import audit_tables, guarantee, render, run_audit, tables
from kr_fast.report.private import banner
from kr_fast.report.render import Block, Figures, figure
from kr_fast.report.sections import ablation, cards, few_step, generator, measured, quality, reading, search, verdict
from kr_fast.report.sentences import OF_RUN


def blocks(summary: dict[str, Any], figures: Figures) -> Iterator[Block]:
    """The sections of the report, in the order in which a reader wants them: what follows from the cards is folded."""
    audit, words = summary.get("audit"), run_audit.verdict(summary)
    decided = summary.get("verdict") or (audit or {}).get("verdict")
    if private := banner(summary.get("shows_real_images", False), False):
        yield "banner", private
    if wrong := guarantee.contradiction(summary):
        yield "banner", wrong
    yield verdict.block(decided, words)
    yield cards.of_run(summary, run_audit.strongest(summary), decided)
    if audit:
        yield from reading.blocks(audit, OF_RUN, run_audit.terms(summary))
    yield "heading", "What these figures do not say"
    yield "note", run_audit.caveats(summary)
    yield "heading", "Real and synthetic images" if summary.get("shows_real_images") else "Synthetic images"
    yield figure("images", figures)
    yield "heading", "Details"
    yield from render.folded(_details(summary, words if decided else None, figures))


def _details(summary: dict[str, Any], words: str | None, figures: Figures) -> Iterator[Block]:
    yield from verdict.rules(summary.get("verdict") or (summary.get("audit") or {}).get("verdict"))
    yield "heading", "Teacher and Student side by side"
    if words:
        yield "text", words
    yield "table", run_audit.headline(summary)
    yield "text", f"{run_audit.intervals(summary)} CAS: Classification Accuracy Score."
    yield from quality.blocks(summary)
    yield from guarantee.blocks(summary)
    if summary.get("audit"):
        yield from measured.blocks(summary["audit"], OF_RUN, figures)
        yield "heading", "Membership attacks"
        yield from _attacks(summary, figures)
    else:
        yield "heading", "Membership attacks"
        yield "missing", "No audit was run."
    yield from generator.memorised(summary)
    yield "heading", "Training"
    yield figure("curves", figures)
    yield from search.blocks(summary, figures)
    yield from few_step.blocks(summary)
    yield from ablation.blocks(summary)
    yield "heading", "Time"
    if summary.get("stages"):
        yield "table", tables.stages(summary)
        if rates := tables.throughput(summary):
            yield "text", f"{rates[0].upper()}{rates[1:]}. The Student trains while the next set is drawn on a CPU."
        if summary.get("budget"):
            yield "text", run_audit.more_time(summary)
        yield figure("stages", figures)
    yield "heading", "What was run"
    data = summary["dataset"]
    yield (
        "text",
        f"Data: {data['name']}, {data['num_classes']} classes, {data['train']} / {data['val']} / {data['test']} images "
        f"for training / validation / test, {data['height']} x {data['width']} x {data['channels']}. "
        f"Seed {summary['seed']}.",
    )
    if data.get("notes"):
        yield "text", f"How the images were read: {'; '.join(data['notes'])}."
    yield "code", summary["command"]
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]
    yield "code", json.dumps(summary["config"], indent=1)


def _attacks(summary: dict[str, Any], figures: Figures) -> Iterator[Block]:
    setting = summary["audit"]["setting"]
    yield (
        "text",
        f"{setting['members']} members (training split) and {setting['non_members']} non-members (test split). "
        f"{run_audit.shadows_made(summary)} Queries: {setting['augment']}; LiRA variance: {setting['lira_variance']}.",
    )
    yield "table", run_audit.what_was_run(summary)
    if summary["audit"]["leave_one_out"]:
        yield "text", audit_tables.RECIPES
        yield "table", run_audit.recipes(summary)
        yield "text", "The very models of this run:"
    yield "table", run_audit.every_attack(summary)
    yield (
        "text",
        "AUC with its own 95 % interval. The primary attack was named beforehand; the others are exploratory. "
        f"{run_audit.named_for_control(summary['audit'])}"
        "Corrected intervals, bounds of epsilon and figures at thresholds from the shadows are in metrics.json, and in "
        "audit.html where the run wrote it.",
    )
    if run_audit.RELEASED in summary["audit"]:
        yield "text", "The released images by themselves, without any model:"
        yield "table", run_audit.released(summary)
    yield "table", run_audit.low_fpr(summary)
    yield (
        "text",
        "TPR is taken at the largest realised FPR that is at most the stated one. Its interval covers the TPR at "
        "the threshold whose true FPR is the stated one; below 10 false positives only the interval is quoted.",
    )
    yield figure("roc", figures)


def write_html(out: Path, summary: dict[str, Any], figures: Figures) -> Path:
    """Write ``report.html``."""
    return render.write_html(out / "report.html", summary["title"], blocks(summary, figures), figures)


def write_markdown(out: Path, summary: dict[str, Any], figures: Figures) -> Path:
    """Write ``report.md`` and its figures under ``figures/``."""
    return render.write_markdown(out / "report.md", summary["title"], blocks(summary, figures), figures)
