"""One configuration with several seeds: a run for each, and what varies between them.

What does not depend on the seed is done once: the data are read and checked, fingerprinted and searched for
near-duplicates. Where the data have no splits of their own, these are cut by the seed.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kr_fast.data import read
from kr_fast.membership.verdict.paths import figures
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import Result, of_memory, recycle
from kr_fast.report import seeds_document
from kr_fast.report.private import without_folders
from kr_fast.report.run_audit import FULL, TEACHER
from kr_fast.runtime import state
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.layout import Folder
from kr_fast.runtime.versions import versions

LEVEL = 0.95
MOST = 1000
WHOSE = {TEACHER: "Teacher", FULL: "Student"}
ATTACKS = {"lira": "LiRA online", "lira_offline": "LiRA offline", "rmia": "RMIA"}
# Title -> path of the figure in metrics.json, see docs/audit/verdict.md.
FIGURES = {
    "test accuracy, Teacher": "teacher.test_accuracy",
    "test accuracy, Student (CAS)": "student.test_accuracy",
    "CAS gap": "cas_gap",
    "macro AUC on the test images, Teacher": "teacher.test_auc",
    "macro AUC on the test images, Student": "student.test_auc",
    "quadratic weighted kappa on the test images, Teacher": "teacher.test_kappa",
    "quadratic weighted kappa on the test images, Student": "student.test_kappa",
    **{
        f"{words} AUC, mean of {whose}s made alike": f"leave_one_out.{name}.{attack}.auc.mean"
        for attack, words in ATTACKS.items()
        for name, whose in WHOSE.items()
    },
    **{f"canaries, AUC in twins of the {name.capitalize()}": f"canaries.{name}.auc" for name in ("teacher", "student")},
    **{f"records found, {whose}": f"{name}.records" for name, whose in WHOSE.items()},
    "released images, calibrated AUC, all periods": "released_calibrated.all_periods.offline.auc",
    "negative controls that did not pass": "negative_controls_failed",
}


@dataclasses.dataclass(frozen=True)
class SeedsResult:
    """The runs in order of their seeds, the dictionary of ``summary.json``, and the path of the page."""

    results: list[Result]
    summary: dict[str, Any]
    report: Path


def seeds_of(config: RecycleConfig, count: int) -> range:
    """The seeds of :func:`recycle_seeds`. Raises: as it does, for ``count`` and ``config.out``."""
    count = as_integer("run", "seeds", count, 2, MOST)
    if config.epsilon:
        fail("run", "seeds", "be left out with epsilon, which each of the runs would spend on the same images", count)
    if Folder(Path(config.out)).config.exists():
        fail("run", "out", "hold no run of a single seed where seeds is given", config.out)
    return range(config.seed, config.seed + count)


def recycle_seeds(
    config: RecycleConfig, count: int, done: Callable[[int, Result], None] | None = None, *, data: Any = None
) -> SeedsResult:
    """A run for each of the seeds ``config.seed`` to ``config.seed + count - 1``, in ``OUT/seed-SEED``, and a summary.

    Each is a run as any other, and a call with the same configuration continues the one that was stopped. The summary
    (``OUT/release/summary.json``, ``summary.html`` and ``summary.md``) holds of each figure the values, their mean,
    standard deviation and Student's t interval of the mean, which takes the runs as a sample of seeds.

    Args:
        count: of seeds, at least 2.
        done: called with the seed and the result of each finished run.
        data: images in memory, as of :func:`kr_fast.recycle`.
    Raises: as :func:`kr_fast.recycle`; UserError if ``config.out`` holds a run itself.
    """
    seeds, out = seeds_of(config, count), Path(config.out)
    manifest.refuse_inside(config.out, config.data, "run")
    config, source = (config, read(config.data, options=config.reading)) if data is None else of_memory(config, data)
    if not source.has_splits:
        logger.info("run: the data have no splits of their own, so those of each seed are others")
    results = []
    for seed in seeds:
        results.append(recycle(dataclasses.replace(config, seed=seed, out=str(out / f"seed-{seed}")), source=source))
        if done is not None:
            done(seed, results[-1])
    summary = summarize([result.metrics for result in results], cut_by_seed=not source.has_splits)
    page = Folder(out).release / "summary.html"
    if state.current().is_main:
        files.write_json(page.with_suffix(".json"), summary)
        seeds_document.write(page.parent, summary)
    return SeedsResult(results, summary, page)


def summarize(metrics: Sequence[dict[str, Any]], *, cut_by_seed: bool) -> dict[str, Any]:
    """The dictionary of ``summary.json``, of the ``metrics.json`` of each seed.

    A figure that not every run has is left out.
    """
    of_runs = []
    for each in metrics:
        values = figures(each["audit"], each)
        values["seconds"] = sum(each["stages"].values())
        of_runs.append(values)
    rows = []
    for title, path in {**FIGURES, "seconds": "seconds"}.items():
        values = [run[path] for run in of_runs if path in run]
        if len(values) == len(of_runs):
            rows.append({"title": title, "path": path, **spread(values)})
    config = {key: value for key, value in metrics[0]["config"].items() if key != "seed"}
    return {
        "title": f"Knowledge Recycling on {metrics[0]['dataset']['name']}, {len(metrics)} seeds",
        "seeds": [each["seed"] for each in metrics],
        "cut_by_seed": cut_by_seed,
        "level": LEVEL,
        "rows": rows,
        "decisions": [each["verdict"]["decision"] for each in metrics],
        "versions": versions("torch"),
        "config": without_folders(config),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"values", "mean", "sd", "interval"}: Student's t, ``mean +- t_(n - 1) sd / sqrt(n)``; None for one value."""
    from scipy.stats import t

    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return {"values": list(values), "mean": mean, "sd": None, "interval": None}
    sd = statistics.stdev(values)
    reach = float(t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return {"values": list(values), "mean": mean, "sd": sd, "interval": [mean - reach, mean + reach]}
