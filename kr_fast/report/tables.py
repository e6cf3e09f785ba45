"""The numbers of a run as tables and as ``metrics.json``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kr_fast.runtime.storage import files

MODELS = ("teacher", "student")
CHANCE = (0.0, 0.5)  # of a difference, and of an AUC
MOST_DIGITS = 6
LEAST_P = 1e-300  # below it floats run out, and no p is 0


def number(value: Any, digits: int = 3, limits: Sequence[float] = CHANCE) -> str:
    """A number for people; "not measured" for None and NaN.

    It has more digits where it would read as one of the ``limits`` that it is not: 0.5003 is above chance, 0.5 is not.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    texts = (f"{round(value, more) + 0.0:.{more}f}" for more in range(digits, max(digits, MOST_DIGITS) + 1))
    apart = (text for text in texts if all(float(text) != limit or value == limit for limit in limits))
    return next(apart, f"{round(value, digits) + 0.0:.{digits}f}")


def rounded_up(epsilon: float) -> str:
    """An epsilon that holds from above, with three digits behind the point: it still does."""
    return f"{math.ceil(1000 * epsilon) / 1000:g}"


def rounded_down(epsilon: float | None) -> str:
    """An epsilon that holds from below, with two digits behind the point: it still does."""
    return number(None if epsilon is None else math.floor(100 * epsilon + 1e-9) / 100, 2, ())


def p_value(p: float | None) -> str:
    """A p with two digits, or more where it would read as 0.05 and is not."""
    if p is None:
        return "no variance"
    if p < LEAST_P:
        return f"< {LEAST_P:g}"
    texts = (f"{p:.{digits}g}" for digits in range(2, MOST_DIGITS + 1))
    return next((text for text in texts if float(text) != 0.05 or p == 0.05), f"{p:.2g}")


def stated(p: float | None) -> str:
    """``p = 0.004``."""
    text = p_value(p)
    return text if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


def private_to(guarantee: Mapping[str, Any]) -> str:
    """``(1.234, 1e-05)-differentially private``: of the entry ``guarantee`` of a run's metrics."""
    return f"({rounded_up(guarantee['epsilon'])}, {guarantee['delta']:g})-differentially private"


def percent(value: float | None) -> str:
    """A share as percent, two digits behind the point."""
    return number(None) if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` (Wilson, JASA 1927)."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - reach, centre + reach


def interval(pair: Sequence[float] | None, digits: int = 3, limits: Sequence[float] = CHANCE) -> str:
    """``[low, high]``, each as :func:`number` has it."""
    return "" if pair is None else f"[{', '.join(number(end, digits, limits) for end in pair)}]"


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells, the first the header, as a Markdown table."""
    text = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in text]
    return "\n".join([lines[0], "|" + "---|" * len(text[0]), *lines[1:]])


def share(value: float | None, count: int) -> str:
    """An accuracy on ``count`` examples with Wilson's interval."""
    if value is None:
        return number(None)
    low, high = wilson(value, count)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def tpr(row: dict[str, Any]) -> str:
    """A TPR with its interval, or the interval alone where it rests on too few false positives."""
    low, high = row["interval"]
    reach = f"[{100 * low:.2f}, {100 * high:.2f}] %"
    if not row["point_claim"]:
        return f"{reach} (only {row['false_positives']} false positives: no point claim)"
    return f"{percent(row['tpr'])} {reach}, {row['false_positives']} false positives"


def trials(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of a search with the chosen one marked."""
    keys = [key for key in rows[0] if key != "chosen"]
    table = [[*(key.replace("_", " ") for key in keys), "chosen"]]
    for row in rows:
        table.append([*(number(row[key]) for key in keys), "yes" if row.get("chosen") else ""])
    return table


def stage_title(name: str) -> str:
    """What a stage is called."""
    return "distillation" if name == "gkd" else name.replace("_", " ")


def stages(summary: dict[str, Any]) -> list[list[str]]:
    """Seconds of each stage and their sum; of a run with a budget, also those that were planned at first."""
    spent, budget = summary["stages"], summary.get("budget")
    rows = [["stage", "seconds"], *([stage_title(name), f"{seconds:.1f}"] for name, seconds in spent.items())]
    rows.append(["sum", f"{sum(spent.values()):.1f}"])
    if budget:
        planned = budget["planned"]
        cells = [
            "planned",
            *(f"{planned[name]:.1f}" if name in planned else "" for name in spent),
            str(budget["seconds"]),
        ]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return rows


THROUGHPUT = {"generator": "generator training", "synthesis": "synthesis", "distillation": "distillation"}


def throughput(summary: dict[str, Any]) -> str:
    """Images a second of what takes most of a run, and how much of the synthesis cost no time of its own."""
    figures = summary.get("throughput") or {}
    parts = [f"{words} {figures[name]:,.0f}" for name, words in THROUGHPUT.items() if figures.get(name)]
    if not parts:
        return ""
    text = f"images/s: {', '.join(parts)}"
    if figures.get("hidden") is not None:
        text += f"; {percent(figures['hidden'])} of the synthesis hidden behind the Student's training"
    return text


OPTIONAL = ("memorisation", "few_step", "ablation", "notes", "throughput", "budget", "tuning_decision", "guarantee")


def metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of ``metrics.json``; what was not measured is None."""
    measured = ("accuracy", "auc", "balanced_accuracy", "ece", "kappa")
    measured += ("recall", "precision", "class_auc", "class_ece", "confusion")
    keep = ["val_accuracy", "parameters", "test_absent_classes", "test_without_duplicates", "test_groups"]
    keep += [f"test_{name}{end}" for name in measured for end in ("", "_ci")]
    models = {model: {key: summary[model].get(key) for key in keep} for model in MODELS}
    rest = ("cas_gap", "student_minus_teacher", "synthetic", "audit", "aop", "stages", "config", "seed", "versions")
    rest += ("dataset", "checkpoints", "tuning")
    rest += tuple(name for name in OPTIONAL if name in summary)
    values = {"verdict": summary.get("verdict"), **models, **{key: summary.get(key) for key in rest}}
    if guarantee := summary.get("guarantee"):
        bounds = lower_bounds(guarantee, summary["audit"]) if summary.get("audit") else []
        values["guarantee"] = {**guarantee, "lower_bounds": bounds}
    return files.strict(values)


def lower_bounds(guarantee: dict[str, Any], audit: dict[str, Any]) -> list[dict[str, Any]]:
    """Epsilon from below, for each attack on what a guarantee covers: the primary ones, and all on released images.

    Args:
        guarantee: as of :meth:`kr_fast.privacy.Ledger.summary`.
        audit: the dictionary of ``audit.json``.
    Returns: ``target``, ``attack``, ``delta``, ``level`` and the bounds by name; ``above``: those that exceed the
        ledger's epsilon, which after a training as the ledger has it each does with a chance of ``1 - level`` at most.
        None where the audit's delta is below the ledger's, at which epsilon may be larger. "gaussian" is in no
        ``above``, as it holds for Gaussian mechanisms alone.
    """
    entries = []
    for name, facts in audit["setting"]["targets"].items():
        if facts["control"]:
            continue
        for attack in audit[name] if facts["kind"] == "released" else (facts["primary"],):
            found = audit[name][attack]["epsilon"]
            own = {key: found[key] for key in ("delta", "level", "clopper_pearson", "one_run", "gaussian")}
            above = None
            if guarantee["epsilon"] is not None and found["delta"] >= guarantee["delta"]:
                proved = {bound: found[bound] or 0.0 for bound in ("clopper_pearson", "one_run")}
                above = [bound for bound, value in proved.items() if value > guarantee["epsilon"]]
            entries.append({"target": name, "attack": attack, **own, "above": above})
    return entries
