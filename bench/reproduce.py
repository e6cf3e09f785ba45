"""The tables of docs/measured/results.md: each data set x variant x seed is a run of ``kr-fast run``.

    python bench/reproduce.py --data-folder FOLDER              # everything that is not done yet
    python bench/reproduce.py --only 'digits/private/0'         # a part; * and ? as in a shell, several may be given
    python bench/reproduce.py --list                            # what is done
    python bench/reproduce.py --write-docs                      # docs/measured/results.md from the rows

FOLDER holds MedMNIST's ``retinamnist.npz``, ``pneumoniamnist.npz`` and ``breastmnist.npz`` at 28 px. A run that was
stopped goes on in its folder; rows that are there are kept unless the options of their run have changed since.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE = ROOT / "bench" / "results" / "reproduction.json", ROOT / "docs" / "measured" / "results.md"
SEEDS = (0, 1, 2)

# Data set -> its preset and options, those of its audits and the seeds that have one. "file": in --data-folder.
MEDMNIST = {"preset": "small", "audit": "--num-shadows 16 --audit-canaries 40", "audited": (0,)}
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {"preset": "digits", "audit": "--audit-canaries 40", "audited": SEEDS},
    "retinamnist": {**MEDMNIST, "file": "retinamnist.npz"},
    "pneumoniamnist": {**MEDMNIST, "file": "pneumoniamnist.npz", "audit": "--num-shadows 8 --audit-canaries 40"},
    "breastmnist": {**MEDMNIST, "file": "breastmnist.npz", "options": "--teacher-epochs 40"},
}
# Run -> options beside those of the data set, the data sets that it is made on (all without), and a preset added.
# Where it takes the generator of another run of the seed, "generator_of": the same data, options and seed train it.
# Retrained: the audit trains a generator on each half too, which adds what leaks through the images.
# "audited": "no" for accuracies alone. "audit": in place of the data set's, where canaries are refused.
# "generator_of": MedMNIST's runs take the generator of that run of the same seed, which theirs would equal bit for bit.
# Sizes: as many steps of the Student for each size, whose epochs are whole numbers at 4 passes of 1,024 images.
VARIANTS: dict[str, dict[str, str]] = {
    "default": {"options": "--ablation"},
    "private": {"preset": "private", "generator_of": "default"},
    "accurate": {"preset": "accurate", "generator_of": "default", "audited": "no"},
    "epsilon-8": {"options": "--epsilon 8", "audit": "--num-shadows 8", "on": "pneumoniamnist"},
    "epsilon-1": {"options": "--epsilon 1", "audit": "--num-shadows 8", "on": "pneumoniamnist"},
    "few-step": {"options": "--few-steps 1", "on": "digits retinamnist"},
    "retrained": {"options": "--audit-generator retrained", "on": "digits"},
    "private-retrained": {"preset": "private", "options": "--audit-generator retrained", "on": "digits"},
    "sizes-256": {"options": "--images 256 --student-epochs 16", "on": "digits"},
    "sizes-1024": {"options": "--images 1024 --student-epochs 4", "on": "digits"},
    "sizes-4096": {"options": "--images 4096 --student-epochs 1", "on": "digits"},
}
# Row of a run with --ablation -> (labels, whether regenerated) of its Student in metrics.json.
ABLATION = {"hard-fixed": ("class", False), "hard-regenerated": ("class", True), "soft-fixed": ("soft", False)}
NO_SHADOWS = "not measured on a Student of the ablation"
# Figure -> (path in the flat figures of metrics.json, why it is missing where it is). {set}: student_full or teacher.
AUDIT = {
    "lira_auc": ("leave_one_out.{set}.lira.auc.mean", "no audit"),
    "lira_auc_ci": ("leave_one_out.{set}.lira.auc.interval", "no audit"),
    "lira_offline_auc": ("leave_one_out.{set}.lira_offline.auc.mean", "no audit"),
    "rmia_auc": ("leave_one_out.{set}.rmia.auc.mean", "no population: RMIA needs further non-members"),
    "rmia_auc_ci": ("leave_one_out.{set}.rmia.auc.interval", "no population: RMIA needs further non-members"),
    "tpr_at_1": ("leave_one_out.{set}.lira.tpr_at_fpr.0.01.mean", "fewer than 10 false positives of some model"),
    "records": ("{set}.records", "too few shadows to find a single record"),
    "canary_auc": ("canaries.{model}.auc", "no canaries"),
    "canary_auc_ci": ("canaries.{model}.auc_ci", "no canaries"),
}
# With epsilon shadows are trained without noise, and attacking them tells nothing of the run's own models: these are
# attacked, by those shadows.
TRANSFER = {
    "lira_auc": "{set}.lira.auc",
    "lira_auc_ci": "{set}.lira.auc_ci",
    "lira_offline_auc": "{set}.lira_offline.auc",
    "rmia_auc": "{set}.rmia.auc",
    "rmia_auc_ci": "{set}.rmia.auc_ci",
    "tpr_at_1": "{set}.lira.tpr_at_fpr.0.01.tpr",
}


class Run(NamedTuple):
    """One command: a data set, a variant, a seed."""

    dataset: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}/{self.variant}/{self.seed}"

    @property
    def options(self) -> str:
        """Of ``kr-fast run``, without folders."""
        data, variant = DATASETS[self.dataset], VARIANTS[self.variant]
        presets = ",".join(filter(None, (data["preset"], variant.get("preset"))))
        audited = self.seed in data["audited"] and variant.get("audited") != "no"
        audit = variant.get("audit", data["audit"]) if audited else "--num-shadows 0"
        parts = (f"--preset {presets}", audit, data.get("options"), variant.get("options"), f"--seed {self.seed}")
        return " ".join(filter(None, parts))

    @property
    def guaranteed(self) -> bool:
        """Whether it is differentially private."""
        return "--epsilon" in self.options.split()

    @property
    def names(self) -> list[str]:
        """The variants of its rows."""
        if self.variant == "default":
            return ["teacher", "gkd", *ABLATION]
        own = self.variant == "private" or self.guaranteed  # Teachers of their own kind
        return [self.variant, f"{self.variant}-teacher"] if own else [self.variant]


def runs() -> Iterator[Run]:
    """Every run, in order; one seed of all comes before the next one."""
    for seed in SEEDS:
        for dataset in DATASETS:
            for variant, facts in VARIANTS.items():
                if dataset in facts.get("on", dataset).split():
                    yield Run(dataset, variant, seed)


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows so far."""
    return json.loads(path.read_text()) if path.exists() else []


def state(run: Run, rows: list[dict[str, Any]]) -> str:
    """ "done", "" or what the rows of the run lack."""
    mine = [row for row in rows if (row["dataset"], row["seed"]) == (run.dataset, run.seed)]
    options = {row["variant"]: row["options"] for row in mine if row["variant"] in run.names}
    if not options:
        return ""
    if missing := [name for name in run.names if name not in options]:
        return f"done without {', '.join(missing)}"
    return "done" if set(options.values()) == {run.options} else "done with other options"


def data_of(run: Run, folder: Path | None) -> str:
    """The data set as ``--data`` takes it."""
    name = DATASETS[run.dataset].get("file")
    if name is None:
        return run.dataset
    if folder is None or not (folder / name).exists():
        raise SystemExit(f"reproduce: --data-folder must hold {name}, got {folder}")
    return str(folder / name)


def folder_of(run: Run, work: Path) -> Path:
    """Of a run; with other options it is another one."""
    digest = hashlib.sha256(run.options.encode()).hexdigest()[:8]
    return work / f"{run.dataset}-{run.variant}-{run.seed}-{digest}"


def make(run: Run, folder: Path | None, work: Path) -> dict[str, Any]:
    """Run it, or continue it; returns its ``metrics.json``."""
    from kr_fast.runtime.storage.layout import Folder

    out = folder_of(run, work)
    flags = [*run.options.split(), "--data", data_of(run, folder), "--out", str(out)]
    if (other := VARIANTS[run.variant].get("generator_of")) and "file" in DATASETS[run.dataset]:
        source = folder_of(run._replace(variant=other), work)
        if source.exists():
            flags += ["--generator", str(source)]
        else:
            print(f"{run} trains its generator: {run._replace(variant=other)} is not in {work}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    subprocess.run([sys.executable, "-m", "kr_fast", "run", *flags], check=True, env=environment)
    return json.loads(Folder(out, guaranteed=run.guaranteed).metrics.read_text())


def machine() -> dict[str, Any]:
    """What a time depends on, without the name of a machine."""
    import torch

    from kr_fast.benchmarks import results

    facts = results.machine("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "processor": facts["gpu"] or facts["processor"],
        "threads": facts["threads"],
        "torch": torch.__version__.partition("+")[0],
        "commit": results.commit(ROOT),
        "date": facts["date"],
    }


def rows_of(run: Run, metrics: Mapping[str, Any], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a finished run; ``facts``: of :func:`machine`. What does not apply is None, and ``why`` says so."""
    return [row_of(run, name, metrics) | {**facts, "options": run.options} for name in run.names]


def row_of(run: Run, name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One row: the Teacher, the Student of the run, or one of its ablation."""
    from kr_fast.membership.verdict.paths import figures

    values = figures(metrics["audit"], metrics)
    of_teacher, why = name.endswith("teacher"), {}
    teacher = metrics["teacher"]
    model = teacher if of_teacher else metrics["student"]
    if name in ABLATION:
        rows = metrics.get("ablation") or ()
        model = next((row for row in rows if (row["labels"], row["regenerated"]) == ABLATION[name]), {})
    row: dict[str, Any] = {"dataset": run.dataset, "variant": name, "seed": run.seed}
    row |= {"accuracy": model.get("test_accuracy"), "auc": model.get("test_auc")}
    row["without_duplicates"] = model.get("test_without_duplicates")
    row |= {"teacher_accuracy": teacher["test_accuracy"], "teacher_auc": teacher.get("test_auc"), "cas_gap": None}
    if of_teacher:
        why["cas_gap"] = "a Teacher has none"
    elif row["accuracy"] is not None:
        row["cas_gap"] = row["teacher_accuracy"] - row["accuracy"]
    names = {"set": "teacher" if of_teacher else "student_full", "model": "teacher" if of_teacher else "student"}
    for figure, (path, missing) in AUDIT.items():
        path = (TRANSFER.get(figure, path) if run.guaranteed else path).format(**names)
        ends = [values.get(f"{path}.{k}") for k in (0, 1)]
        row[figure] = values.get(path)
        if figure.endswith("_ci"):
            row[figure] = None if None in ends else ends
        if row[figure] is None:
            why[figure] = missing
    if name in ABLATION:
        reason = model.get("not_attacked") or NO_SHADOWS
        row |= dict.fromkeys(AUDIT)
        why |= dict.fromkeys(AUDIT, reason)
        for attack, figure in (model.get("leakage") or {}).items():
            row[f"{attack}_auc"] = figure["mean"]
            if f"{attack}_auc_ci" in AUDIT:
                row[f"{attack}_auc_ci"] = figure["interval"]
        why = {figure: reason for figure, reason in why.items() if row.get(figure) is None}
    of_images = not of_teacher and name not in ABLATION
    row["released_auc"], why["released_auc"] = None, "no images of its own" if not of_images else "no audit"
    for path in ("released_calibrated.last_period.offline.auc", "released.nearest_synthetic.auc"):
        if of_images and path in values:
            row["released_auc"], row["released_attack"] = values[path], path.rpartition(".")[0]
            del why["released_auc"]
            break
    if name in ABLATION:
        why["without_duplicates"] = "not measured of the ablation's Students"
    elif not row["without_duplicates"]:
        row["without_duplicates"], why["without_duplicates"] = None, "no test image has one in training or validation"
    row["negative_control"] = values.get("negative_controls_failed")
    row["images_per_second"] = metrics.get("throughput")
    row["seconds"] = sum(metrics["stages"].values())
    for figure, value in row.items():
        if value is None:
            why.setdefault(figure, "not in metrics.json")
    return {**row, "why": why}


def save(rows: list[dict[str, Any]], path: Path = ROWS) -> None:
    """Write the rows in the order of the table, one to a line, whole or not at all."""
    order = {name: k for k, name in enumerate(DATASETS)}
    variants = [name for each in runs() for name in each.names]
    rows = sorted(rows, key=lambda row: (order[row["dataset"]], variants.index(row["variant"]), row["seed"]))
    text = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{text}\n]\n" if rows else "[]\n")
    os.replace(temporary, path)


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``new`` ones in place of those of the same data set, variant and seed."""
    keys = {(row["dataset"], row["variant"], row["seed"]) for row in new}
    return [row for row in rows if (row["dataset"], row["variant"], row["seed"]) not in keys] + new


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-folder", type=Path, default=None, help="folder of MedMNIST's .npz files")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduction"), help="folder of the runs")
    parser.add_argument("--only", nargs="*", default=["*"], help="runs by dataset/variant/seed, with * and ?")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of the rows")
    parser.add_argument("--list", action="store_true", help="print what is done")
    parser.add_argument("--write-docs", action="store_true", help="write docs/measured/results.md from the rows")
    arguments = parser.parse_args(argv)
    chosen = [run for run in runs() if any(fnmatch.fnmatch(str(run), pattern) for pattern in arguments.only)]
    if not chosen:
        parser.error(f"--only must match a run of --list, got {' '.join(arguments.only)}")
    if arguments.list:
        rows = read_rows(arguments.rows)
        print("\n".join(f"{run!s:32} {state(run, rows) or '-'}" for run in chosen))
        return 0
    if arguments.write_docs:
        from results_page import page

        PAGE.write_text(page(read_rows(arguments.rows)))
        return 0
    for run in chosen:
        if state(run, read_rows(arguments.rows)) == "done":
            continue
        print(f"{run}: kr-fast run {run.options}", flush=True)
        made = rows_of(run, make(run, arguments.data_folder, arguments.work), machine())
        save(merged(read_rows(arguments.rows), made), arguments.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
