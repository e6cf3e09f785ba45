"""A run's folder as an export reads it: finished, unchanged, and with everything in it that the export needs."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from kr_fast.recycling.trained_generator import is_run, refuse_seeds
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import Journal, refuse
from kr_fast.runtime.storage.layout import Folder


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """``metrics``: the dictionary of metrics.json; ``teacher``: the option of that name, "" for a trained one."""

    folder: Folder
    metrics: dict[str, Any]
    teacher: str

    @property
    def config(self) -> dict[str, Any]:
        """The options, with the last part of every path only."""
        return self.metrics["config"]


class _Facts(dict):
    """A dictionary of metrics.json; the error of a missing key names the file, which another version wrote."""

    def __init__(self, values: dict[str, Any], path: Path):
        super().__init__({key: _facts(value, path) for key, value in values.items()})
        self._path = path

    def __missing__(self, key: str) -> Any:
        fail("export", str(self._path), "be of this version of kr-fast", f"no {key}; make the run again")


def _facts(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_facts(each, path) for each in value]
    return _Facts(value, path) if isinstance(value, dict) else value


def open_run(run: str | Path) -> FinishedRun:
    """The run in the folder ``run``.

    Raises: UserError if it is no folder of a run, of another layout, not finished, or if the Student, the Teacher, the
        synthetic images or the figures are not as their stages left them.
    """
    folder, asked = Folder(run), ("export", "RUN")
    if not is_run(folder.out):
        refuse_seeds(folder.out, asked)
        fail(*asked, "be the folder of a run of kr-fast", run)
    folder.check(*asked)
    journal, options = Journal(folder.out), manifest.read_config(folder.config)
    folder = Folder(run, bool(options.get("epsilon")))
    if "teacher" not in options:
        fail(*asked, "be the folder of kr-fast run", f"{run}, that of another command")
    if options.get("command") == "generator":
        fail(*asked, "be the folder of a run that has a Student", f"{run}, that of kr-fast generator")
    if journal.done("report") is None:
        last = list(journal.seconds())[-1:] or ["none"]
        rule = "be a finished run (the same kr-fast run command continues it)"
        fail(*asked, rule, f"{run}, whose last finished stage is {last[0]}")
    for stage in ("teacher", "gkd"):
        journal.check(stage, "export")
    for path, got in journal.changed("report"):
        if path in (folder.metrics, folder.privacy_ledger):
            refuse(journal, "report", "export", path, got)
    metrics = _Facts(files.read_json(folder.metrics, dict), folder.metrics)
    return FinishedRun(folder, metrics, str(options["teacher"]))


def check_out(run: FinishedRun, out: Path) -> None:
    """Refuse an ``out`` that is not empty, lies below a file, or would mix with what a run keeps to itself."""
    asked, inside = ("export", "OUT"), out.resolve()
    own, released = (run.folder.out, run.folder.mapped_images), inside.is_relative_to(run.folder.release.resolve())
    if any(inside.is_relative_to(each.resolve()) for each in own) and not released:
        fail(*asked, f"lie outside the run, or in {run.folder.release}: the rest of a run must not leave", out)
    there = next(above for above in (out, *out.absolute().parents) if above.exists() or above.is_symlink())
    if not there.is_dir():
        fail(*asked, "be a folder", out if there == out else f"{out}, but {there} is a file")
    if there == out and any(out.iterdir()):
        raise UserError(f"export: OUT must be a new or an empty folder, got {out} with {next(out.iterdir()).name}")
    # It is made beside OUT and renamed.
    if there == out and os.path.ismount(out):
        fail(*asked, "be no mount point (name a new folder in it)", out)
    above = inside.parent if there == out else there
    if not os.access(above, os.W_OK | os.X_OK):
        fail(*asked, "lie in a folder that can be written to", f"{out}, but {above} cannot")
