"""Trackers of Accelerate (``--log-with``): curves while they are made, and the figures of each stage.

They are told numbers about trainings and models, and the options with the last part of every path only. No image, no
name and no number of a record goes to them. Rank 0 alone logs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kr_fast.membership.verdict.paths import figures
from kr_fast.report import without_folders
from kr_fast.runtime import progress
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

PROJECT = "kr_fast"
ONE_COUNT = ("swanlab", "trackio", "wandb")  # whose step counts all that is logged, and cannot begin anew with a curve


def check(names: tuple[str, ...]) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is not installed. Raises: UserError."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = sorted(LOGGER_TYPE_TO_CLASS), [each.value for each in get_available_trackers()]
    for name in names:
        if name not in known:
            fail("run", "log_with", f"name trackers of Accelerate ({', '.join(known)})", name)
        if name not in installed:
            fail("run", "log_with", f"name trackers whose packages are installed (pip install {name})", name)


@contextlib.contextmanager
def tracked(names: tuple[str, ...], folder: Path, options: Mapping[str, Any]) -> "Iterator[Trackers]":
    """The trackers ``names`` of a run, which are told every curve and closed at the end.

    Args:
        folder: where those write that write files.
        options: the configuration, as plain values.
    """
    trackers = Trackers(_started(names, folder, options) if names else [])
    try:
        with progress.listening(trackers.curve) if names else contextlib.nullcontext():
            yield trackers
    finally:
        trackers.finish()


class Trackers:
    """Started trackers of Accelerate; one that fails is given up, with a line, and the run goes on."""

    def __init__(self, trackers: list[Any]):
        self.trackers = trackers

    def curve(self, name: str, unit: str, done: int, values: Mapping[str, float]) -> None:
        """``values`` of the training ``name`` after ``done`` units, such as epochs."""
        self._log({f"{name}/{key}": value for key, value in values.items()}, done, f"{name}/{unit}")

    def stage(self, name: str, seconds: float, result: Mapping[str, Any]) -> None:
        """The numbers in the result of a finished stage."""
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        self._log({f"{name}/{key}": float(value) for key, value in {"seconds": seconds, **numbers}.items()})

    def metrics(self, path: Path) -> None:
        """The figures of a finished run, as its ``metrics.json`` has them."""
        if self.trackers:
            values = files.read_json(path, dict)
            self._log({name: float(value) for name, value in figures(values["audit"], values).items()})

    def _log(self, values: dict[str, float], step: int | None = None, axis: str = "step") -> None:
        for tracker in list(self.trackers):
            own = {"step": step}
            if step is not None and tracker.name in ONE_COUNT:
                own = {"values": {**values, axis: step}}
            self._call(tracker, "log", **{"values": values, **own})

    def finish(self) -> None:
        """Close all trackers."""
        for tracker in list(self.trackers):
            self._call(tracker, "finish")
        self.trackers.clear()

    def _call(self, tracker: Any, method: str, **values: Any) -> None:
        try:
            getattr(tracker, method)(**values)
        except Exception as error:  # of the tracker's package, as where its server cannot be reached
            logger.warning("run: %s failed and is told nothing more (%s)", tracker.name, first_line(error))
            self.trackers.remove(tracker)


def _started(names: tuple[str, ...], folder: Path, options: Mapping[str, Any]) -> list[Any]:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    folder.mkdir(parents=True, exist_ok=True)
    place = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    plain = {name: _plain(value) for name, value in without_folders(dict(options)).items()}
    try:
        own = Accelerator(mixed_precision="no", log_with=list(dict.fromkeys(names)), project_config=place)
        own.init_trackers(PROJECT, plain, {"wandb": {"dir": str(folder)}})
    except Exception as error:  # of a tracker's package, as without an account
        rule = "name trackers that can be started"
        raise UserError(f"run: log_with must {rule}, got {', '.join(names)} ({first_line(error)})") from error
    return list(own.trackers)


def _plain(value: Any) -> Any:
    """As tracker takes it: a list as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else value
