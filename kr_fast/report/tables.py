"""The numbers of a run as tables and as ``metrics.json``."""

import math
from collections.abc import Sequence
from typing import Any

from kr_fast.runtime import files

ATTACK_NAMES = {"loss": "loss threshold", "lira": "LiRA online", "lira_offline": "LiRA offline"}
MODELS = ("teacher", "student")


def number(value: Any, digits: int = 3) -> str:
    """A number for people; "not measured" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as percent, two digits behind the point."""
    return number(None) if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` (Wilson, JASA 1927)."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - reach, centre + reach


def interval(pair: Sequence[float] | None, digits: int = 3) -> str:
    """``[low, high]``."""
    return "" if pair is None else f"[{number(pair[0], digits)}, {number(pair[1], digits)}]"


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells, the first the header, as a Markdown table."""
    text = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in text]
    return "\n".join([lines[0], "|" + "---|" * len(text[0]), *lines[1:]])


def headline(summary: dict[str, Any]) -> list[list[str]]:
    """Teacher / Student / gap."""
    audit, aop, tested = summary.get("audit"), summary.get("aop"), summary["dataset"]["test"]
    rows = [["", "Teacher (real images)", "Student (synthetic images)", "Teacher - Student"]]
    accuracy = [summary[m].get("test_accuracy") for m in MODELS]
    rows.append(["test accuracy (Student: CAS)", *(_share(a, tested) for a in accuracy), percent(summary["cas_gap"])])
    for attack, name in ATTACK_NAMES.items():
        if audit and attack in audit["teacher"]:
            found = [audit[m][attack] for m in MODELS]
            cells = [f"{number(f['auc'])} {interval(f['auc_ci'])}" for f in found]
            rows.append([f"{name}: AUC", *cells, number(found[0]["auc"] - found[1]["auc"])])
    if aop:
        gap = aop["teacher"] - aop["student"]
        rows.append(["AOP = accuracy / (2 max(AUC, 0.5))^2", *(number(aop[m]) for m in MODELS), number(gap)])
    return rows


def _share(value: float | None, count: int) -> str:
    if value is None:
        return number(None)
    low, high = wilson(value, count)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def low_fpr(summary: dict[str, Any]) -> list[list[str]]:
    """TPR at low FPR, with the false-positive count that each rests on."""
    rows = [["attack", "at FPR", "Teacher TPR", "Student TPR"]]
    audit = summary["audit"]
    for attack, name in ATTACK_NAMES.items():
        if attack not in audit["teacher"]:
            continue
        for fpr in audit["teacher"][attack]["tpr_at_fpr"]:
            cells = [tpr(audit[m][attack]["tpr_at_fpr"][fpr]) for m in MODELS]
            rows.append([name, f"{100 * float(fpr):g} %", *cells])
    return rows


def tpr(found: dict[str, Any]) -> str:
    """A TPR with its interval, or the interval alone where it rests on too few false positives."""
    low, high = found["interval"]
    reach = f"[{100 * low:.2f}, {100 * high:.2f}] %"
    if not found["point_claim"]:
        return f"{reach} (only {found['false_positives']} false positives: no point claim)"
    return f"{percent(found['tpr'])} {reach}, {found['false_positives']} false positives"


def trials(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of a search with the chosen one marked."""
    keys = [key for key in rows[0] if key != "chosen"]
    table = [[*(key.replace("_", " ") for key in keys), "chosen"]]
    for row in rows:
        table.append([*(number(row[key]) for key in keys), "yes" if row.get("chosen") else ""])
    return table


def stages(summary: dict[str, Any]) -> list[list[str]]:
    """Seconds of each stage and their sum."""
    spent = summary["stages"]
    rows = [["stage", "seconds"], *([name, f"{seconds:.1f}"] for name, seconds in spent.items())]
    return [*rows, ["sum", f"{sum(spent.values()):.1f}"]]


def verdict(summary: dict[str, Any]) -> str:
    """The result in one paragraph of plain words, built from the numbers."""
    teacher, student = (summary[m]["test_accuracy"] for m in MODELS)
    data = summary["dataset"]
    text = (
        f"A Teacher trained on {data['train']} real images of {data['name']} classifies {percent(teacher)} of "
        f"{data['test']} real test images correctly. A Student that saw only synthetic images and the Teacher's soft "
        f"labels classifies {percent(student)}: a gap of {100 * summary['cas_gap']:.2f} points."
    )
    if not summary.get("audit"):
        return text + " No membership attack was run."
    found = {m: summary["audit"][m]["lira"] for m in MODELS}
    for model in MODELS:
        low = found[model]["auc_ci"][0]
        outcome = "tells members from non-members better than chance" if low > 0.5 else "is not above chance here"
        text += (
            f" The strongest attack run, online LiRA, {outcome} on the {model.capitalize()} "
            f"(AUC {number(found[model]['auc'])}, 95 % interval {interval(found[model]['auc_ci'])})."
        )
    return text


def caveats(summary: dict[str, Any]) -> list[str]:
    """What the figures do not say."""
    lines = [
        "The protection measured here is empirical. It is not differential privacy and carries no guarantee: it says "
        "how far the attacks named above got, and a stronger attack may get further.",
        "The Student was attacked with shadows of the Teacher's training (a transfer attack), a lower bound on what it "
        "gives away. Distillation alone is known to give only limited privacy (Jagielski et al., NeurIPS 2023).",
        "The generator and the synthetic images were not attacked. Whoever is given them can attack them directly.",
        "Every choice (epoch, checkpoint, sampling) was made on the validation split, which is private data too; the "
        "test split was read once, at the end.",
    ]
    return [*lines, *(f"Warning of the audit: {note}." for note in summary.get("notes", []))]


def metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of ``metrics.json``; what was not measured is None."""
    keep = ("test_accuracy", "val_accuracy", "parameters")
    found = {m: {key: summary[m].get(key) for key in keep} for m in MODELS}
    rest = ("cas_gap", "audit", "aop", "stages", "config", "seed", "versions", "dataset", "checkpoints", "tuning")
    return files.strict({**found, **{key: summary.get(key) for key in rest}})
