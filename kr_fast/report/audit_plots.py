"""Figures of an audit, once for light and once for dark pages."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kr_fast.report import plots, sentences
from kr_fast.report.plots import in_both_themes

# Okabe and Ito; the primary attack is always drawn in the first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7F00", "#777777")
BRIGHT = ("#FF8533", "#4DB2FF", "#2FD6A3", "#E6A3CC", "#FFC24D", "#9FDCFF", "#C9BE3A", "#AAAAAA")  # on dark pages
STYLES = ("-", "--", ":", "-.")
MOST_LINES = 10


def _colours() -> tuple[str, ...]:
    import matplotlib

    return BRIGHT if matplotlib.rcParams["text.color"] == plots.DARK["text.color"] else COLOURS


def roc(
    lines: dict[str, dict[str, np.ndarray]], primary: str, titles: dict[str, str], negatives: int, level: float
) -> bytes:
    """ROC on logarithmic axes; the band is of the primary attack's TPR at each true FPR."""
    figure = plots.new_figure(8.6, 4.8)
    axis = figure.subplots()
    least, colours = 0.5 / negatives, _colours()
    drawn = [primary, *(name for name in lines if name != primary)][:MOST_LINES]
    for k, name in reversed(list(enumerate(drawn))):
        line, colour = lines[name], colours[k % len(colours)]
        label, style = (
            titles.get(name, name),
            {"lw": 1.1, "alpha": 0.85, "linestyle": STYLES[(k + k // len(colours)) % len(STYLES)]},
        )
        if k == 0:
            label, style = f"{label} (primary)", {"lw": 2.2, "alpha": 1, "linestyle": "-"}
            low, high = np.maximum(line["low"], least), np.maximum(line["high"], least)
            axis.fill_between(line["grid"], low, high, color=colour, alpha=0.18, lw=0, label=f"{100 * level:g} % band")
        fpr, tpr = np.maximum(line["fpr"], least), np.maximum(line["tpr"], least)
        axis.plot(fpr, tpr, color=colour, drawstyle="steps-post", label=label, **style)
    axis.plot([least, 1], [least, 1], color="#888888", lw=1, label="chance")
    few = min(1.0, 10 / negatives)
    axis.axvspan(least, few, color="#888888", alpha=0.12, lw=0, label="below 10 false positives")
    axis.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.05))
    if len(drawn) < len(lines):
        axis.set_title(f"{len(drawn)} of {len(lines)} attacks", fontsize=10)
    axis.set_xlabel("false-positive rate")
    axis.set_ylabel("true-positive rate")
    axis.grid(True, which="major", alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    order = [labels.index(label) for label in labels if "primary" in label]
    order += [k for k in reversed(range(len(labels))) if k not in order]
    figure.legend([handles[k] for k in order], [labels[k] for k in order], fontsize=8, loc="outside right upper")
    return plots.png(figure)


def intervals(audit: dict[str, dict[str, Any]], order: list[str], titles: dict[str, str]) -> bytes:
    """AUC of every attack with its interval, the targets side by side in colours."""
    rows = list(dict.fromkeys(attack for name in order for attack in audit[name]))
    figure = plots.new_figure(8.6, 0.9 + 0.09 * len(order) + 0.16 * len(rows) * max(len(order), 2))
    axis, colours = figure.subplots(), _colours()
    for k, name in enumerate(order):
        colour = colours[k % len(colours)]
        positions = [r + 0.7 * ((k + 0.5) / len(order) - 0.5) for r, attack in enumerate(rows) if attack in audit[name]]
        results = [audit[name][attack] for attack in rows if attack in audit[name]]
        auc = np.array([row["auc"] for row in results])
        low, high = np.array([row["auc_ci"] for row in results]).T
        style = {"fmt": "o", "ms": 4, "capsize": 2, "lw": 1.3}
        axis.errorbar(auc, positions, xerr=[auc - low, high - auc], color=colour, label=plots.literal(name), **style)
        for position, row, value in zip(positions, results, auc, strict=True):
            if row["role"] == "primary":
                axis.plot(value, position, "o", ms=9, mfc="none", mec=colour)
    axis.axvline(0.5, color="#888888", lw=1)
    axis.set_yticks(range(len(rows)), [titles.get(attack, attack) for attack in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("AUC (ring: primary attack; line: chance)")
    axis.grid(True, axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower left", ncols=2)
    return plots.png(figure)


def histogram(scores: np.ndarray, members: np.ndarray, label: str) -> bytes:
    """Scores of members and of non-members as shares; the outer 0.5 % on each side lie in the last bins."""
    figure = plots.new_figure(8.6, 2.5)
    axis, colours = figure.subplots(), _colours()
    finite = scores[np.isfinite(scores)]
    low, high = np.quantile(finite, [0.005, 0.995]) if len(finite) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, 50)
    for mask, colour, name in ((members, colours[0], "members"), (~members, colours[1], "non-members")):
        values = np.clip(np.nan_to_num(scores[mask], nan=low, posinf=high, neginf=low), low, high)
        weights = np.full(len(values), 1 / max(len(values), 1))
        axis.hist(values, bins, weights=weights, color=colour, alpha=0.45, label=f"{name} ({len(values)})")
        axis.hist(values, bins, weights=weights, color=colour, histtype="step", lw=1.3)
    axis.set_xlabel(label)
    axis.set_ylabel("share")
    axis.legend(fontsize=8)
    return plots.png(figure)


def gallery(images: np.ndarray, captions: list[str]) -> bytes:
    """uint8 ``[n, H, W, C]`` in rows of eight, each with its caption above it."""
    count, height, width = images.shape[:3]
    columns = min(8, count)
    rows = -(-count // columns)
    gap, line = max(width // 12, 1), max(height // 4, 2)
    sheet = np.zeros((rows * (height + line), columns * (width + gap), 4), dtype=np.uint8)  # transparent
    figure = plots.new_figure(1.08 * columns, 1.08 * columns * sheet.shape[0] / sheet.shape[1])
    axis = figure.subplots()
    axis.set_axis_off()
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        top, left = (k // columns) * (height + line) + line, (k % columns) * (width + gap)
        tile = sheet[top : top + height, left : left + width]
        tile[..., :3], tile[..., 3] = image, 255
        axis.text(
            left + width / 2 - 0.5, top - 0.2 * line - 0.5, plots.literal(caption), ha="center", va="bottom", fontsize=7
        )
    axis.imshow(sheet, interpolation="nearest")
    return plots.png(figure)


def _means(each: dict[str, Any]) -> dict[str, Any]:
    """Averages over shadows as rows of targets."""
    shown = {attack: row for attack, row in each.items() if row["auc"]["interval"] is not None}
    return {
        attack: {"auc": row["auc"]["mean"], "auc_ci": row["auc"]["interval"], "role": row["role"]}
        for attack, row in shown.items()
    }


def all_figures(
    audit: dict[str, Any],
    lines: dict[str, dict[str, dict[str, np.ndarray]]],
    scores: dict[str, dict[str, np.ndarray]],
    members: np.ndarray | None,
    images: np.ndarray | None,
) -> dict[str, tuple[bytes, str, bytes]]:
    """Name -> (PNG, alternative text, PNG for dark pages)."""
    drawn: dict[str, tuple[bytes, str, bytes]] = {}

    def add(name: str, text: str, draw: Callable[..., bytes], *arguments: Any) -> None:
        light, dark = in_both_themes(draw, *arguments)
        drawn[name] = (light, text, dark)

    setting, labels = audit["setting"], audit["details"].get("labels")
    titles = {name: attack["title"] for name, attack in setting["attacks"].items()}
    if setting["targets"]:
        order = sorted(setting["targets"], key=lambda name: bool(setting["targets"][name]["control"]))
        means = {name: _means(each) for name, each in audit["leave_one_out"].items()}
        rows = {f"mean of models {sentences.maker(audit, n, labels)}": each for n, each in means.items() if each}
        rows |= {sentences.target_title(audit, name, labels): audit[name] for name in order}
        text = "AUC of every attack, averaged over shadows and on every target, with its interval"
        add("intervals", text, intervals, rows, list(rows), titles)
    for name, facts in setting["targets"].items():
        primary, called = facts["primary"], sentences.target_title(audit, name, labels)
        text = f"ROC curves of the attacks on {called} on logarithmic axes, with the chance line"
        add(f"roc {name}", text, roc, lines[name], primary, titles, setting["non_members"], setting["level"])
        label = f"score of {titles.get(primary, primary)}"
        text = f"Scores of members and of non-members of {called}"
        add(f"scores {name}", text, histogram, scores[name][primary], members, label)
        rows = audit["exposed"].get(name)
        if images is not None and rows and not facts["control"]:
            captions = [""] * len(rows)
            if audit["show_records"]:
                captions = [f"#{row['index']}" + ("" if row["label"] is None else f" · {row['label']}") for row in rows]
            shown = np.asarray(images[[row["position"] for row in rows]])
            add(f"exposed {name}", f"The most exposed members of {called}", gallery, shown, captions)
    return drawn
