"""Which examples ``kr-fast audit`` attacks, from the names of splits and files: the pool, its members, a population."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data import load, load_uncut
from kr_fast.membership.audit.api import check_further
from kr_fast.membership.audit.config import SPLITS, AuditConfig
from kr_fast.membership.audit.pool import SUFFIXES, chosen, pool_of, read_members
from kr_fast.membership.statistics.epsilon import check_fair_coins
from kr_fast.runtime.errors import fail


class Pool:
    """All images of the data, and of these the ones under attack.

    ``images`` and ``labels`` are all of them, ``splits`` name -> (first, end), ``classes`` their number; ``index`` is
    of the pool in all images, ``members`` bool of the pool; ``population`` is None, (images, labels), or a share of
    the non-members.

    Raises: UserError naming the option, or the file and its line; FileNotFoundError.
    """

    def __init__(self, config: AuditConfig):
        self.config = config
        if config.cut >= 0:
            fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
            cut = load(config.data, seed=config.cut, **fractions)
            parts = {name: getattr(cut, name) for name in ("train", "val", "test")}
            self.classes = cut.num_classes
        else:
            _, names, parts = load_uncut(config.data)
            self.classes = len(names)
        self.images = torch.cat([part.images for part in parts.values()])
        self.labels = torch.cat([part.labels for part in parts.values()])
        ends = np.cumsum([len(part) for part in parts.values()]).tolist()
        self.splits = dict(zip(parts, zip([0, *ends[:-1]], ends, strict=True), strict=True))
        self._choose()

    def _choose(self) -> None:
        config, count = self.config, len(self.images)
        inside = self._examples("members", config.members)
        outside = config.non_members
        if outside == "auto":
            outside = "test" if _are_splits(config.members) else None
        others = None if outside is None else self._examples("non_members", outside)
        wanted = config.population
        if wanted == "auto":
            wanted = "val" if "val" in self.splits and _are_splits(config.members) else "none"
            if wanted == "val" and "val" in config.members.split(",") + config.non_members.split(","):
                wanted = "none"
        self.population: Any = None
        apart = None
        if _are_splits(wanted):
            apart = torch.as_tensor(self._examples("population", wanted))
            self.population = (self.images[apart], self.labels[apart])
        elif wanted != "none":
            self.population = _share(wanted)
        if others is None and apart is not None:
            rest = torch.ones(count, dtype=torch.bool)
            rest[apart] = False
            others = rest & ~chosen("members", inside, count)
        self.members, index = pool_of(inside, others, count)
        self.index = torch.arange(count) if index is None else index
        if apart is not None:
            self._check_apart(apart, wanted)
        if config.random_members:
            if isinstance(self.population, float):
                rule = "be splits or none with random_members: a share takes from the non-members only"
                fail("audit", "population", rule, wanted)
            check_fair_coins("audit", self.members)
        if isinstance(self.population, float):
            outside = int((~self.members).sum())
            if not 0 < round(self.population * outside) < outside:
                fail("audit", "population", f"be a share that leaves some of {outside} non-members", wanted)

    def _check_apart(self, apart: Tensor, wanted: str) -> None:
        if bool(torch.isin(apart, self.index).any()):
            if self.config.population == "auto":
                rule = f"share no example with the population, which is {wanted} unless --population names another"
                fail("audit", "members and non_members", rule, f"{self.config.members} and {self.config.non_members}")
            fail("audit", "population", "share no example with members and non-members", self.config.population)
        check_further(self.population[0], self.images[self.index])

    def _examples(self, name: str, value: str) -> Any:
        """Indices, or a mask, of the examples that an option names."""
        if _are_splits(value):
            found = []
            for split in value.split(","):
                if split not in self.splits:
                    rule = f"be among the splits of the data, {', '.join(self.splits)}, or a file"
                    fail("audit", name, rule, split)
                found.append(torch.arange(*self.splits[split]))
            return torch.cat(found)
        path = Path(value)
        if path.suffix.lower() not in SUFFIXES:
            fail("audit", name, "be splits of the data, or an .npy, .txt or .csv file", value)
        return read_members(path, name)


def _share(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 < found < 1:
        fail("audit", "population", "be splits, a share in (0, 1), none or auto", value)
    return found


def _are_splits(value: str) -> bool:
    return all(part in SPLITS for part in value.split(","))
