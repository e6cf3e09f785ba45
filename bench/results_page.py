"""docs/measured/results.md from the rows of bench/results/reproduction.json: measured rows only."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kr_fast.data.printable import counted

Row = dict[str, Any]
TITLES = {
    "digits": "scikit-learn's digits (8 px)",
    "retinamnist": "RetinaMNIST (28 px)",
    "pneumoniamnist": "PneumoniaMNIST (28 px)",
    "breastmnist": "BreastMNIST (28 px)",
}
VARIANTS = {
    "teacher": "Teacher, on real images",
    "hard-fixed": "Student: class labels, one synthetic set",
    "hard-regenerated": "Student: class labels, regenerated",
    "soft-fixed": "Student: soft labels, one synthetic set",
    "gkd": "Student: soft labels, regenerated (GKD)",
    "private-teacher": "Teacher, preset `private`",
    "private": "Student, preset `private`",
    "accurate": "Student: GKD, preset `accurate`",
    "epsilon-8-teacher": "Teacher, `--epsilon 8` (4 by itself)",
    "epsilon-8": "Student: GKD, `--epsilon 8`",
    "epsilon-1-teacher": "Teacher, `--epsilon 1` (0.5 by itself)",
    "epsilon-1": "Student: GKD, `--epsilon 1`",
    "few-step": "Student: GKD from a generator of one step",
    "retrained": "Student: GKD, generators retrained for the audit",
    "private-retrained": "Student, preset `private`, generators retrained for the audit",
}
# ResNet-18 (28 px) of MedMNIST v2, Table 3 (Yang et al., Scientific Data 10:41, 2023): AUC, accuracy.
PUBLISHED = {"retinamnist": (0.717, 0.524), "pneumoniamnist": (0.944, 0.854), "breastmnist": (0.901, 0.863)}
START = """# Results

Written by `python bench/reproduce.py --write-docs` from `bench/results/reproduction.json`, which that
script measures: every figure here is of a run of this package, mean and standard deviation over seeds. Each seed has
other weights, batches and noise; of data without splits of their own (digits) also other training, validation and test
images. "(of 1)": of so many of the seeds, as the others were not audited. MedMNIST's rows of the presets `private` and
`accurate` take the generator of the default run of their seed, or train its equal. Minutes are of whole runs, some of
them beside other programs on the same processors, one halted for 28 minutes (epsilon 1, seed 0).

- **accuracy**, **AUC** (macro one-vs-rest, as MedMNIST computes it): on the real test images. **CAS gap**: points of
  accuracy that the Student is below its run's Teacher.
- **LiRA**, **LiRA offline**, **RMIA**: mean AUC over shadow models that were made as the row's model was, each attacked
  from the others with both sides equalised; 0.5 is chance. **TPR**: of LiRA at 1 % FPR. **records**: single training or
  test images found, of all seeds. **canaries**: AUC on mislabelled training images. **images**: AUC of the attack on
  the released synthetic images, calibrated by the images of other pipelines where their generators were retrained.
- **With `--epsilon`** shadows are trained without noise, and attack the run's own Teacher and Student: members against
  validation and test images. PneumoniaMNIST's differ from its training images by themselves (told apart without any
  model, AUC 0.647), so an AUC above 0.5 may be that difference.
- The protection is empirical, but for `--epsilon` and its delta of 1e-5: it says how far these attacks got, and a
  stronger one may get further.
"""
GAPS = """## CAS gap over the data sets

Points of accuracy that a Student is below its Teacher: the mean over the seeds of each data set, of how many, and the
mean over data sets of what all of them have, ± its standard error from the spread over seeds. The published mean is in
the last section. MedMNIST's test sets have 156 to 624 images here, so one Student differs from the next by points.
"""
NONE = "No row has been measured yet."
END = """## What others publish

The published mean of the CAS gap is -1.24 points, real minus synthetic over nine data sets, six of them of MedMNIST
(Lomurno and Matteucci, Pattern Recognition Letters 190, 2025, as a summary of the paper quotes it). Its tables by data
set were not available to us, so no row here is compared with one of them.

"""
PUBLISHED_HEAD = ["data set", "AUC", "accuracy"]


def page(rows: Sequence[Row]) -> str:
    """The whole text."""
    parts = [START]
    if not rows:
        parts.append(NONE + "\n")
    for name, title in TITLES.items():
        mine = [row for row in rows if row["dataset"] == name and not row["variant"].startswith("sizes")]
        if mine:
            parts += [f"## {title}\n", models(mine), *apart(mine), measured_on(mine)]
    if len(summary := gaps(rows)) > 1:
        parts.append(GAPS + "\n" + markdown(summary))
    if sizes := [row for row in rows if row["variant"].startswith("sizes")]:
        parts.append(
            "## Size of the synthetic set\n\nDigits, ten periods, as many steps of the Student for each size.\n"
        )
        parts += [by_size(sizes), measured_on(sizes)]
    published = [[TITLES[name], f"{auc:.3f}", f"{accuracy:.3f}"] for name, (auc, accuracy) in PUBLISHED.items()]
    table = markdown([PUBLISHED_HEAD, *published])
    note = "MedMNIST v2's ResNet-18 at 28 px, trained on real images (Yang et al., Scientific Data 10:41, 2023):\n\n"
    return "\n".join([*parts, END + note + table])


def models(rows: Sequence[Row]) -> str:
    """Accuracy and leakage of each variant."""
    head = ["", "seeds", "accuracy", "AUC", "CAS gap", "LiRA", "LiRA offline", "RMIA", "TPR", "records", "canaries"]
    table = [[*head, "images"]]
    for variant, title in VARIANTS.items():
        if mine := [row for row in rows if row["variant"] == variant]:
            table.append([title, str(len(mine)), *_accuracies(mine), *_leakage(mine)])
    return markdown(table)


def apart(rows: Sequence[Row]) -> list[str]:
    """A table of what the test gives without the images that have a near-duplicate in training or validation."""
    table = [["", "seeds", "test images", "accuracy", "AUC"]]
    for variant, title in VARIANTS.items():
        mine = [row for row in rows if row["variant"] == variant and row["without_duplicates"]]
        if mine:
            parts = [row["without_duplicates"] for row in mine]
            counts = "/".join(sorted({str(part["images"]) for part in parts}))
            cells = [_mean(parts, "accuracy", _percent), _mean(parts, "auc", _number)]
            table.append([title, str(len(mine)), counts, *cells])
    words = "Without the test images that have a near-duplicate in the training or validation split:\n"
    return [words, markdown(table)] if len(table) > 1 else []


def gaps(rows: Sequence[Row]) -> list[list[str]]:
    """The table of ``GAPS``: a line for each kind of Student, and a column for each data set."""
    names = [name for name in TITLES if any(row["dataset"] == name for row in rows)]
    table = [["", *(TITLES[name].partition(" (")[0] for name in names), "mean"]]
    for variant, title in VARIANTS.items():
        found = [
            [row["cas_gap"] for row in rows if (row["dataset"], row["variant"]) == (name, variant)] for name in names
        ]
        if "eacher" in variant or not all(found) or len(found) < 2:
            continue
        cells = [f"{_points(statistics.fmean(values))} ({len(values)})" for values in found]
        mean = _points(statistics.fmean(map(statistics.fmean, found)))
        if all(len(values) > 1 for values in found):
            variances = [statistics.variance(values) / len(values) for values in found]
            mean += f" ± {_points(sum(variances) ** 0.5 / len(found))}"
        table.append([title, *cells, mean])
    return table


def by_size(rows: Sequence[Row]) -> str:
    """CAS and leakage against images per period."""
    head = ["images per period", "seeds", "accuracy", "AUC", "CAS gap", "LiRA", "LiRA offline", "RMIA", "TPR"]
    table = [[*head, "records", "canaries", "images"]]
    for size in sorted({int(row["variant"].partition("-")[2]) for row in rows}):
        mine = [row for row in rows if row["variant"] == f"sizes-{size}"]
        table.append([f"{size:,}", str(len(mine)), *_accuracies(mine), *_leakage(mine)])
    return markdown(table)


def measured_on(rows: Sequence[Row]) -> str:
    """Seeds, processors, time and versions of the rows."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    kinds = sorted({f"{row['processor']}, {counted(row['threads'], 'thread')}, torch {row['torch']}" for row in rows})
    minutes = [row["seconds"] / 60 for row in rows]
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"Seeds {seeds}; {'; '.join(kinds)}; {min(minutes):.1f} to {max(minutes):.1f} minutes a run; commit {commits}; "
        f"{when}.\n"
    )


def _accuracies(rows: Sequence[Row]) -> list[str]:
    return [_mean(rows, "accuracy", _percent), _mean(rows, "auc", _number), _mean(rows, "cas_gap", _points)]


def _leakage(rows: Sequence[Row]) -> list[str]:
    cells = [_mean(rows, name, _number) for name in ("lira_auc", "lira_offline_auc", "rmia_auc")]
    found = [row["records"] for row in rows if row["records"] is not None]
    cells += [_mean(rows, "tpr_at_1", _percent), f"{sum(found)}{_of(found, rows)}" if found else ""]
    return [*cells, *(_mean(rows, name, _number) for name in ("canary_auc", "released_auc"))]


def _mean(rows: Sequence[Row], name: str, words: Callable[[float], str]) -> str:
    """Mean and standard deviation over the rows that have the figure; of how many, where others have none."""
    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        return ""
    text = words(statistics.fmean(values)) + (f" ± {words(statistics.stdev(values))}" if len(values) > 1 else "")
    return text + _of(values, rows)


def _of(values: Sequence[Any], rows: Sequence[Row]) -> str:
    return "" if len(values) == len(rows) else f" (of {len(values)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, whose first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
