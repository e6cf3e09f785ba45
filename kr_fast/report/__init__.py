"""Plain results (dicts and arrays) to HTML, Markdown and plots. Knows no other part of the package."""

from pathlib import Path
from typing import Any

from kr_fast.report.private import repeated, without_folders
from kr_fast.report.tables import markdown_table, metrics

__all__ = ["markdown_table", "metrics", "repeated", "without_folders", "write", "write_audit"]


def write(out: str | Path, summary: dict[str, Any], arrays: dict[str, Any]) -> tuple[Path, Path]:
    """Write ``report.html`` (one self-contained file) and ``report.md`` (figures in ``figures/``) into ``out``.

    Args:
        out: folder.
        summary: title, command, config, seed, versions, stages, dataset, teacher, student, cas_gap,
            student_minus_teacher, synthetic, audit, aop, checkpoints, tuning, notes; a missing part is reported as
            missing.
        arrays: synthetic_grid (uint8 ``[K, n, H, W, C]``), curves, roc (``"teacher/lira" -> fpr, tpr``), and real_grid
            where real images may be shown, which the page then states in a banner.
    Returns: the two paths. Each file appears whole or not at all.
    """
    from kr_fast.report import document, plots

    out = Path(out)
    figures = plots.all_figures(summary, arrays)
    summary = {**summary, "shows_real_images": arrays.get("real_grid") is not None}
    return document.write_html(out, summary, figures), document.write_markdown(out, summary, figures)


def write_audit(
    out: str | Path,
    audit: dict[str, Any],
    lines: dict,
    scores: dict,
    members: Any,
    images: Any = None,
    show_records: bool = False,
    synthetic: Any = None,
) -> Path:
    """Write ``audit.html`` into ``out``: see :func:`kr_fast.report.audit_document.write_audit`."""
    from kr_fast.report import audit_document

    return audit_document.write_audit(Path(out), audit, lines, scores, members, images, show_records, synthetic)
