"""The context of every stage: configuration, data, folder, journal and process state."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data import Dataset, SplitDuplicates
from kr_fast.models import classifier
from kr_fast.recycling.budget.ledger import Ledger
from kr_fast.recycling.config import RecycleConfig
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.state import Runtime
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import Journal
from kr_fast.runtime.storage.layout import Folder
from kr_fast.synthesis import LabelPlan


@dataclasses.dataclass(frozen=True)
class Precision:
    """What classifiers and the generator are trained in, "float32" or "bfloat16", and why."""

    classifiers: str = "float32"
    generator: str = "float32"
    reason: str = "the default"

    def __str__(self) -> str:
        if self.classifiers == self.generator:
            return f"{self.classifiers}: {self.reason}"
        return f"classifiers {self.classifiers}, generator {self.generator}: {self.reason}"


@dataclasses.dataclass
class Context:
    """The run so far. ``journal.done(stage)`` holds the results of finished stages."""

    config: RecycleConfig
    out: Path
    runtime: Runtime
    data: Dataset
    journal: Journal
    notes: list[str] = dataclasses.field(default_factory=list)  # of the checks before the first stage
    precision: Precision = Precision()
    ledger: Ledger | None = None  # of a run with a budget
    privacy: Any = None  # the ledger of a differentially private run, once it is open
    spending: dict[str, Any] | None = None  # what it will spend on its trainings, once that is computed
    duplicates: SplitDuplicates | None = None  # of the data as they were read
    dropped: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # split -> which of these are not in ``data``

    @property
    def folder(self) -> Folder:
        """The paths of the run's files."""
        return Folder(self.out, bool(self.config.epsilon))

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage returned."""
        result = self.journal.done(stage)
        if result is None:
            raise RuntimeError(f"recycle: stage {stage} must be finished first")
        return result

    def label_plan(self, real: Tensor | None = None) -> LabelPlan:
        """Classes of synthetic images: as frequent as in the labels ``real`` (None: the training split's), or alike."""
        classes = self.data.num_classes
        if self.config.label_plan == "balanced":
            return LabelPlan.balanced(classes)
        return LabelPlan.counts(self.class_counts(real))

    def class_counts(self, real: Tensor | None = None) -> list[int]:
        """How often each class occurs in the labels ``real`` (None: the training split's), as far as it may be told: in
        a run under differential privacy as it was noised, or declared to be public, whatever ``real``.
        """
        if self.config.epsilon:
            return self.result("privacy")["class_counts"]
        labels = self.data.train.labels if real is None else real
        return torch.bincount(labels, minlength=self.data.num_classes).tolist()

    def make_network(self, arch: str, width: int) -> Callable[[], nn.Module]:
        """A factory of classifiers for these data."""
        height, side, channels = self.data.image_shape
        options = {"num_classes": self.data.num_classes, "in_channels": channels, "width": width}
        return functools.partial(classifier, arch, **options, image_size=max(height, side))

    def network(self, arch: str, width: int) -> nn.Module:
        """A fresh classifier for these data."""
        return self.make_network(arch, width)()

    def seeded(self, arch: str, width: int, *names: object) -> nn.Module:
        """A classifier whose first weights are a function of (seed, names), on this process's device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(self.config.seed, "weights", *names))
            return self.network(arch, width).to(self.runtime.device)


MEASURED = ("score", "seconds")  # of a trial


class Trials:
    """Results of short trainings by key, saved in a file, so that a stopped search continues.

    They belong to one Teacher and one generator.
    """

    def __init__(self, context: Context):
        self.path = path = context.folder.state / "trials.json"
        self._made_from = context.journal.digest("teacher", "generator")
        self._results: dict[str, dict[str, float]] = files.read_json(path, dict) if path.exists() else {}
        for each in self._results.values():
            if not isinstance(each, dict) or not all(isinstance(each.get(name), int | float) for name in MEASURED):
                rule = "hold score and seconds of each trial"
                raise UserError(f"{path} must {rule}, got something else; delete it to try again")

    def get(self, run: Callable[[], float], **key: Any) -> float:
        """``run()``, or what it returned before for ``key``."""
        name = self._name(key)
        if name not in self._results:
            start = time.perf_counter()
            self._results[name] = {"score": run(), "seconds": time.perf_counter() - start}
            files.write_json(self.path, self._results)
        return self._results[name]["score"]

    def seconds(self, **key: Any) -> float:
        """What the trial of ``key`` took."""
        return self._results[self._name(key)]["seconds"]

    def _name(self, key: dict[str, Any]) -> str:
        return json.dumps({**key, "made_from": self._made_from}, sort_keys=True)
