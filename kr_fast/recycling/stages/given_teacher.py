"""``--teacher``: what it names, and the network and the weights that it stands for."""

import dataclasses
from pathlib import Path
from typing import Any

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.trained_generator import is_run, refuse_seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage import manifest
from kr_fast.runtime.storage.journal import Journal
from kr_fast.runtime.storage.layout import Folder

ASKED = ("run", "teacher")
NAMES = "pkg.mod:factory, a file or the folder of a run"


@dataclasses.dataclass(frozen=True)
class GivenTeacher:
    """A user's Teacher: the network of ``factory``, or without one of ``arch`` and ``width``, with ``weights``.

    ``data``: what the stage ``data`` of its run recorded; None of a Teacher that is of no run.
    """

    factory: str
    weights: Path | None
    arch: str
    width: int
    data: dict[str, Any] | None = None


def given_teacher(name: str, arch: str, width: int) -> GivenTeacher:
    """What the option ``teacher`` stands for: a factory, a file of weights, or the folder of a run.

    Args:
        arch, width: of the network, where ``name`` does not say them.
    Raises: UserError for the folder of something else, and for a run without a finished Teacher.
    """
    path = Path(name)
    if ":" in name and not path.exists():
        return GivenTeacher(name, None, arch, width)
    if not path.exists():
        raise FileNotFoundError(f"run: teacher must be {NAMES}, got {name}")
    return _of_run(path) if path.is_dir() else GivenTeacher("", path, arch, width)


def applied(config: RecycleConfig) -> RecycleConfig:
    """``config`` with architecture and width of the Teacher of a run, where that was given."""
    if not config.teacher or not Path(config.teacher).is_dir():
        return config
    own = _of_run(Path(config.teacher))
    return dataclasses.replace(config, teacher_arch=own.arch, teacher_width=own.width)


def _of_run(path: Path) -> GivenTeacher:
    refuse_seeds(path, ASKED)
    if not is_run(path):
        fail(*ASKED, f"be {NAMES}", f"{path}, a folder of something else")
    folder, journal = Folder(path).check(*ASKED), Journal(path)
    if journal.done("teacher") is None:
        fail(*ASKED, "be a run whose Teacher is trained", path)
    journal.check("teacher", ASKED[0], folder.teacher)
    values, data = manifest.read_config(folder.config), journal.done("data")
    for key in ("teacher", "teacher_arch", "teacher_width"):
        if key not in values:
            fail(*ASKED, "be a run of kr-fast run", f"{path}, without the option {key}")
    own = GivenTeacher("", None, values["teacher_arch"], values["teacher_width"])
    before = values["teacher"]
    if before and (":" in before or Path(before).is_dir()):  # the weights of a file are in the run too
        own = given_teacher(before, own.arch, own.width)
    return dataclasses.replace(own, weights=folder.teacher, data=data)
