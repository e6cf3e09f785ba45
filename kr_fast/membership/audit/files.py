"""The files of an audit: figures, scores, and the report as one page."""

from pathlib import Path
from typing import Any

import numpy as np

from kr_fast.membership.audit.record_table import as_csv
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.layout import Folder


def write(report: Any, out: Path, details: dict[str, Any], show_real_images: bool, show_records: bool) -> Path:
    """See ``AuditReport.write``, of which ``report`` is one."""
    from kr_fast import report as documents

    folder, exposed, pairs = Folder(out).make(), files.strict(report.exposed()), files.strict(report.closest_pairs())
    figures = files.strict({**report.to_dict(), "details": details})
    files.save_arrays(folder.audit_arrays, report.arrays())
    files.write_json(folder.exposed, exposed)
    if pairs:
        files.write_json(folder.closest_pairs, pairs)
    files.write_text(folder.records, as_csv(report.records))
    files.write_json(folder.audit_figures, figures)
    images = None if report.data.images is None or not show_real_images else report.data.images.numpy()
    members = None if report.data.members is None else report.data.members.numpy()
    scores = {n: {a: value.numpy() for a, value in each.items()} for n, each in report.scores.items()}
    pages = folder.pages(show_real_images or show_records)
    figures |= {"exposed": exposed, "closest_pairs": pairs}
    synthetic = {name: each.numpy() for name, each in report.data.synthetic.items()}
    return documents.write_audit(pages, figures, _lines(report), scores, members, images, show_records, synthetic)


def _lines(report: Any) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Target -> attack -> fpr, tpr and the band of the TPR at each true FPR on a logarithmic grid."""
    lines: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, curves in report.curves.items():
        for attack, curve in curves.items():
            grid = np.geomspace(1 / curve.negatives, 0.999, 120)
            low, high = curve.tpr_interval(grid, report.setting["level"])
            line = {"fpr": curve.fpr, "tpr": curve.tpr, "grid": grid, "low": low, "high": high}
            lines.setdefault(name, {})[attack] = line
    return lines
