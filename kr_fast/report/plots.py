"""Figures of a run as PNG bytes. Colours are those of Okabe and Ito, which colour-blind readers can tell apart."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kr_fast.report import tables

TEACHER, STUDENT, GENERATOR, GREY = "#D55E00", "#0072B2", "#009E73", "#777777"
# Of each target in the ROC; the full audit of the Student has a colour of its own.
TARGETS = {
    "teacher": TEACHER,
    "student": STUDENT,
    "student_full": "#CC79A7",
    "released": GENERATOR,
    "control": "#000000",
}
TITLES = {"teacher": "Teacher", "student": "Student", "student_full": "Student"}
TITLES |= {"released": "released images", "control": "positive control"}
STYLES = {"lira": "-", "lira_offline": "--", "loss": ":", "nearest_synthetic": "-", "generated_density": ":"}
ENDS = ((0, "first"), (1, "last"))  # of an interval
MOST_CLASSES = 20  # rows of the image grid
DARK = dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor", "legend.facecolor"), "none")
DARK |= dict.fromkeys(("text.color", "axes.labelcolor"), "#dddddd")
DARK |= dict.fromkeys(("xtick.color", "ytick.color"), "#bbbbbb")
DARK |= {"axes.edgecolor": "#888888", "legend.edgecolor": "#666666", "grid.color": "#666666"}


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's defaults, whatever style its user has set: the same figures give the same bytes."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def new_figure(width: float, height: float):
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def in_both_themes(draw: Callable[..., bytes], *arguments: Any) -> tuple[bytes, bytes]:
    """The figure for light and for dark pages."""
    import matplotlib

    with own_style(), matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        light = draw(*arguments)
        with matplotlib.rc_context(DARK):
            return light, draw(*arguments)


def literal(text: str) -> str:
    """A name from outside as it stands: between dollar signs matplotlib would read mathematics."""
    return text.replace("$", r"\$")


def grid(synthetic: np.ndarray, class_names: list[str], real: np.ndarray | None = None) -> bytes:
    """Synthetic images, one class per row, uint8 ``[K, n, H, W, C]``; real ones of that shape beside them if given."""
    rows = min(len(synthetic), MOST_CLASSES)
    panels = [("synthetic (last period)", synthetic)]
    if real is not None:
        panels.insert(0, ("real (training split)", real))
    tile = 3.7 / synthetic.shape[1]  # inches per column; rows keep the images' proportions
    figure = new_figure(4.5 * len(panels), rows * tile * (synthetic.shape[2] + 1) / (synthetic.shape[3] + 1) + 0.5)
    for axis, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        classes, count, height, width = images[:rows].shape[:4]
        sheet = np.zeros((classes, count, height + 1, width + 1, 4), dtype=np.uint8)  # transparent between images
        sheet[:, :, :height, :width, :3], sheet[:, :, :height, :width, 3] = images[:rows], 255
        sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(classes * (height + 1), count * (width + 1), 4)
        axis.imshow(sheet, interpolation="nearest")
        axis.set_xticks([])
        names = [literal(name if len(name) <= 16 else name[:15] + "…") for name in class_names[:rows]]
        axis.set_yticks([(k + 0.5) * (height + 1) - 1 for k in range(classes)], names, fontsize=8)
        axis.set_title(title if rows == len(images) else f"{title}, {rows} of {len(images)} classes", fontsize=10)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return png(figure)


def curves(training: dict[str, dict[str, list]]) -> bytes:
    """Loss of Teacher, generator and Student over their training, and validation accuracy where there is one."""
    figure = new_figure(10, 2.9)
    panels = (("teacher", "epoch", "train_loss", TEACHER), ("generator", "step", "loss", GENERATOR))
    panels += (("student", "period", "loss", STUDENT),)
    for axis, (name, x, y, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        values = training.get(name) or {}
        x, y = ("step", "loss") if values.get("step") else (x, y)  # a private Teacher has no epochs
        axis.set_title(name.capitalize(), fontsize=10)
        axis.set_xlabel(x)
        if not values.get(y):
            axis.text(0.5, 0.5, "not trained here", ha="center", va="center", transform=axis.transAxes)
            continue
        axis.plot(values[x], values[y], color=colour, label="loss")
        axis.set_ylabel("loss", color=colour)
        if min(values[y]) > 0:
            axis.set_yscale("log")
        if values.get("val_accuracy"):
            twin = axis.twinx()
            twin.plot(values[x], values["val_accuracy"], color=GREY, linestyle="--")
            twin.set_ylabel("validation accuracy", color=GREY)
    return png(figure)


def roc(
    curves: dict[str, dict[str, np.ndarray]], negatives: int | None = None, attacks: dict[str, str] | None = None
) -> bytes:
    """ROC of every attack and target on logarithmic axes, with the chance line; ``attacks``: name -> title."""
    figure = new_figure(7, 5.5)
    axis = figure.subplots()
    least = 0.5 / negatives if negatives else 1e-3
    for name, points in curves.items():
        model, _, attack = name.partition("/")
        model_title = "Student, transfer" if name == "student/lira" else TITLES.get(model, model)
        colour, label = TARGETS.get(model, STUDENT), f"{model_title}: {(attacks or {}).get(attack, attack)}"
        fpr, tpr = np.maximum(points["fpr"], least), np.maximum(points["tpr"], least)
        axis.plot(fpr, tpr, STYLES.get(attack, "-"), color=colour, drawstyle="steps-post", label=label, lw=1.6)
    axis.plot([least, 1], [least, 1], color=GREY, lw=1, label="chance")
    axis.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    axis.set_xlabel("false-positive rate")
    axis.set_ylabel("true-positive rate")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return png(figure)


def draw_roc(fpr: np.ndarray, tpr: np.ndarray, negatives: int, label: str, axes: Any = None) -> Any:
    """One ROC on logarithmic axes; on new ones, which show themselves in a notebook, with the chance line."""
    least = 0.5 / negatives
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(5.5, 4.5), layout="constrained")[1]
        axes.plot([least, 1], [least, 1], color=GREY, lw=1, label="chance")
        axes.set(xscale="log", yscale="log", xlabel="false-positive rate", ylabel="true-positive rate")
        axes.grid(True, which="major", alpha=0.3)
    axes.plot(np.maximum(fpr, least), np.maximum(tpr, least), drawstyle="steps-post", label=label)
    axes.legend(fontsize=8, loc="lower right")
    return axes


def trials(rows: list[dict[str, Any]]) -> bytes:
    """Score on validation against each parameter that varies, by length of the Students; the chosen setting ringed."""
    score = next(key for key in rows[0] if key.startswith("val_"))
    about = ("round", "length", "repeat", "seconds", "chosen", score)
    varied = [key for key in rows[0] if key not in about and len({str(row[key]) for row in rows}) > 1]
    panels = []
    for key in varied:
        if isinstance(rows[0][key], list):  # an interval
            panels += [(f"{key.replace('_', ' ')}: {end}", [row[key][at] for row in rows]) for at, end in ENDS]
        else:
            panels.append((key.replace("_", " "), [row[key] for row in rows]))
    columns = min(len(panels), 4) or 1
    lines = -(-len(panels) // columns) or 1
    figure = new_figure(2.5 * columns + 0.5, 2.3 * lines + 0.4)
    lengths = sorted({row["length"] for row in rows})
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, values) in zip(axes, panels, strict=False):
        for at, length in enumerate(lengths):
            shown = [i for i, row in enumerate(rows) if row["length"] == length]
            shade = 0.25 + 0.75 * (at + 1) / len(lengths)
            axis.scatter(
                [values[i] for i in shown],
                [rows[i][score] for i in shown],
                s=18,
                color=STUDENT,
                alpha=shade,
                label=f"length {length}",
            )
        chosen = [i for i, row in enumerate(rows) if row["chosen"]]
        axis.scatter(
            [values[i] for i in chosen],
            [rows[i][score] for i in chosen],
            s=70,
            facecolors="none",
            edgecolors=TEACHER,
            label="chosen",
        )
        axis.set_xlabel(title, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_ylabel(score.replace("val_", "validation "), fontsize=9)
    axes[0].legend(fontsize=7)
    return png(figure)


def stages(seconds: dict[str, float]) -> bytes:
    """Seconds of each stage as bars."""
    figure = new_figure(7, 0.32 * len(seconds) + 0.7)
    axis = figure.subplots()
    names = [tables.stage_title(name) for name in seconds]
    axis.barh(names, list(seconds.values()), color=STUDENT)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    for index, value in enumerate(seconds.values()):
        axis.text(value, index, f" {value:.0f}", va="center", fontsize=8)
    axis.margins(x=0.12)
    return png(figure)


@own_style()
def all_figures(summary: dict[str, Any], arrays: dict[str, Any]) -> dict[str, tuple]:
    """Name -> (PNG, alternative text) of every figure whose data is there; of images also a PNG for dark pages."""
    figures: dict[str, tuple] = {}
    if arrays.get("synthetic_grid") is not None:
        real = arrays.get("real_grid")
        light, dark = in_both_themes(grid, arrays["synthetic_grid"], summary["dataset"]["class_names"], real)
        start = "Synthetic images" if real is None else "Real training images beside synthetic images"
        figures["images"] = (light, f"{start}, one row for each class", dark)
    if arrays.get("roc"):
        setting = (summary.get("audit") or {}).get("setting") or {}
        titles = {name: attack["title"] for name, attack in setting.get("attacks", {}).items()}
        image = roc(arrays["roc"], setting.get("non_members"), titles)
        figures["roc"] = (image, "ROC curves of the membership attacks on logarithmic axes, with the chance line")
    if arrays.get("curves"):
        figures["curves"] = (curves(arrays["curves"]), "Training curves of Teacher, generator and Student")
    if summary.get("tuning") and "round" in summary["tuning"][0]:
        words = "Score on validation of each trial of the tuning against each parameter, the chosen setting ringed"
        figures["tuning"] = (trials(summary["tuning"]), words)
    if summary.get("stages"):
        figures["stages"] = (stages(summary["stages"]), "Seconds of each stage")
    return figures


def throughput(result: dict[str, Any]) -> bytes:
    """Bars of images per second by provider, without a sink and into it."""
    names = list(result["providers"])
    figure = new_figure(7, 1.2 + 0.6 * len(names))
    axis = figure.subplots()
    positions = np.arange(len(names))[::-1].astype(float)
    bars = [("sampling", STUDENT, [result["providers"][n]["images_per_second"] for n in names])]
    if all("sink" in result["providers"][n] for n in names):
        rates = [result["providers"][n]["sink"]["images_per_second"] for n in names]
        bars.append(("into files", TEACHER, rates))
    height = 0.8 / len(bars)
    for k, (label, colour, rates) in enumerate(bars):
        drawn = axis.barh(positions + height * (0.5 * (len(bars) - 1) - k), rates, height, label=label, color=colour)
        axis.bar_label(drawn, fmt="%.0f", padding=3)
    axis.set_yticks(positions, names)
    axis.set_xlabel("images / s")
    axis.margins(x=0.12)
    case = result["case"]
    axis.set_title(
        f"{case['model']}, {case['scheduler']} {case['steps']} steps, batch {case['batch']}, {result['device']}"
    )
    axis.legend(loc="lower right")
    return png(figure)


def ratios(result: dict[str, Any]) -> bytes:
    """Bars of how many times as long as this package each baseline takes, by case."""
    bars = [
        (f"{case['case']}, {name}", row["ratio"])
        for case in result["cases"]
        for name, row in case["providers"].items()
        if name != "kr_fast" and "ratio" in row
    ]
    figure = new_figure(9, 1.2 + 0.26 * len(bars))
    axis = figure.subplots()
    positions = np.arange(len(bars))[::-1]
    drawn = axis.barh(positions, [ratio for _, ratio in bars], 0.7, color=TEACHER)
    axis.bar_label(drawn, fmt="%.2fx", padding=3)
    axis.axvline(1, color=STUDENT, label="kr_fast")
    axis.set_yticks(positions, [name for name, _ in bars])
    axis.set_xlabel("time, as a multiple of kr_fast's")
    axis.margins(x=0.12)
    facts = result["machine"]
    axis.set_title(
        f"{facts['gpu'] or facts['processor']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    )
    axis.legend(loc="lower right")
    return png(figure)
