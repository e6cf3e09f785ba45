"""The files of an audit: figures, scores, and the report as one page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.membership.attacks import by_group
from kr_fast.membership.audit.record_table import as_csv
from kr_fast.membership.statistics.curve import Curve
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import Images
from kr_fast.runtime.storage.layout import Folder


def write(report: Any, out: Path, details: dict[str, Any], show_real_images: bool, show_records: bool) -> Path:
    """See ``AuditReport.write``, of which ``report`` is one."""
    folder = Folder(out)
    write_private(report, folder)
    images = report.data.images if show_real_images else None
    synthetic = {name: each.numpy() for name, each in report.data.synthetic.items()}
    return write_pages(folder, {**report.to_dict(), "details": details}, images, show_records, synthetic)


def write_private(report: Any, folder: Folder) -> None:
    """What is known of single records: scores, the members most exposed or nearest to released images, all risks."""
    pairs = files.strict(report.closest_pairs())
    folder.make()
    files.save_arrays(folder.audit_arrays, report.arrays())
    files.write_json(folder.exposed, files.strict(report.exposed()))
    if pairs:
        files.write_json(folder.closest_pairs, pairs)
    files.write_text(folder.records, as_csv(report.records))
    if report.group_risks:
        files.write_text(folder.group_risks, by_group.as_csv(report.data, report.group_risks))


def write_pages(
    folder: Folder,
    figures: dict[str, Any],
    images: Images | None,
    show_records: bool,
    synthetic: Mapping[str, np.ndarray],
) -> Path:
    """The figures as JSON and as a page, whose curves are those of :func:`write_private`; returns the path of the page.

    Args:
        figures: of ``AuditReport.to_dict``, and details.
        images: of the pool, uint8 ``[N, H, W, C]``, where real images may be shown; few of them are read.
        synthetic: released set -> its images, likewise.
    """
    from kr_fast import report as documents

    figures = files.strict(figures)
    folder.make()
    files.write_json(folder.audit_figures, figures)
    lines: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder.audit_arrays) as arrays:
        members = arrays["members"] if "members" in arrays.files else None
        for key in arrays.files:
            name, _, attack = key.removesuffix("/scores").partition("/")
            if key.endswith("/scores"):
                scores.setdefault(name, {})[attack] = arrays[key]
                curve = Curve(*(arrays[f"{name}/{attack}/{part}"] for part in ("thresholds", "tp", "fp")))
                lines.setdefault(name, {})[attack] = _line(curve, figures["setting"]["level"])
    pages = folder.pages(images is not None or show_records)
    figures["exposed"] = files.read_json(folder.exposed, dict)
    figures["closest_pairs"] = files.read_json(folder.closest_pairs, dict) if folder.closest_pairs.exists() else {}
    return documents.write_audit(pages, figures, lines, scores, members, images, show_records, synthetic)


def _line(curve: Curve, level: float) -> dict[str, np.ndarray]:
    """fpr, tpr and the band of the TPR at each true FPR on a logarithmic grid."""
    grid = np.geomspace(1 / curve.negatives, 0.999, 120)
    low, high = curve.tpr_interval(grid, level)
    return {"fpr": curve.fpr, "tpr": curve.tpr, "grid": grid, "low": low, "high": high}
