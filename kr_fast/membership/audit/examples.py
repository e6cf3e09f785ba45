"""Which examples ``kr-fast audit`` attacks, from the names of splits and files: the pool, its members, a population."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data import load_uncut, read
from kr_fast.membership.audit.api import check_further
from kr_fast.membership.audit.config import SPLITS, AuditConfig
from kr_fast.membership.inputs.pool import SUFFIXES, chosen, pool_of, read_members
from kr_fast.membership.statistics.epsilon import check_fair_coins
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import ImageRows, Images, rows_of
from kr_fast.runtime.storage.layout import Folder

Splits = dict[str, tuple[int, int]]  # name -> (first, end)


@dataclasses.dataclass(frozen=True)
class Examples:
    """All examples of the data, and of these the ones under attack.

    Args:
        all_images, all_labels: of the data; splits: name -> (first, end) of them; classes: their number.
        index: of the pool in all examples; members: bool, of the pool.
        population: None, (images, labels), or a share of the non-members.
        all_groups: int64 ``[N]`` of the data, or None.
    """

    all_images: Images
    all_labels: Tensor
    splits: Splits
    classes: int
    index: Tensor
    members: Tensor
    population: tuple[Images, Tensor] | float | None
    all_groups: Tensor | None = None

    @property
    def images(self) -> Images:
        """Of the pool."""
        return rows_of(self.all_images, self.index)

    @property
    def labels(self) -> Tensor:
        """Of the pool."""
        return self.all_labels[self.index]

    @property
    def groups(self) -> Tensor | None:
        """Of the pool, or None."""
        return None if self.all_groups is None else self.all_groups[self.index]


def read_examples(config: AuditConfig) -> Examples:
    """Read the data and choose.

    Raises: UserError naming the option, or the file and its line; FileNotFoundError.
    """
    images, labels, groups, splits, classes = _read(config)
    count = len(images)
    inside = _examples("members", config.members, splits)
    outside = config.non_members
    if outside == "auto":
        outside = "test" if _are_splits(config.members) else None
    others = None if outside is None else _examples("non_members", outside, splits)
    named = _population(config, splits)
    population: Any = None
    apart = None
    if _are_splits(named):
        apart = torch.as_tensor(_examples("population", named, splits))
        population = (rows_of(images, apart), labels[apart])
    elif named != "none":
        population = _share(named)
    if others is None and apart is not None:
        rest = torch.ones(count, dtype=torch.bool)
        rest[apart] = False
        others = rest & ~chosen("members", inside, count)
    members, index = pool_of(inside, others, count)
    index = torch.arange(count) if index is None else index
    if apart is not None:
        _check_apart(config, apart, index, named)
        check_further(population[0], rows_of(images, index))
    if config.random_members:
        if isinstance(population, float):
            rule = "be splits or none with random_members: a share takes from the non-members only"
            fail("audit", "population", rule, named)
        check_fair_coins("audit", members)
    if isinstance(population, float):
        non_members = int((~members).sum())
        if not 0 < round(population * non_members) < non_members:
            fail("audit", "population", f"be a share that leaves some of {non_members} non-members", named)
    return Examples(images, labels, splits, classes, index, members, population, groups)


def _read(config: AuditConfig) -> tuple[Images, Tensor, Tensor | None, Splits, int]:
    """(images, labels, groups or None, splits, number of classes)."""
    folder = Folder(config.out).mapped_images
    if config.cut >= 0:
        fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
        cut = read(config.data, options=config.reading).dataset(seed=config.cut, **fractions, folder=folder)
        parts = {name: getattr(cut, name) for name in ("train", "val", "test")}
        classes = cut.num_classes
    else:
        _, names, parts = load_uncut(config.data, options=config.reading, folder=folder)
        classes = len(names)
    ends = np.cumsum([len(part) for part in parts.values()]).tolist()
    splits = dict(zip(parts, zip([0, *ends[:-1]], ends, strict=True), strict=True))
    images, labels = ImageRows(*(part.images for part in parts.values())), torch.cat([p.labels for p in parts.values()])
    groups = [part.groups for part in parts.values()]
    return images, labels, None if any(each is None for each in groups) else torch.cat(groups), splits, classes


def _population(config: AuditConfig, splits: Splits) -> str:
    """The population that is asked for; of "auto" the validation split, where there is one that is not attacked."""
    if config.population != "auto":
        return config.population
    attacked = config.members.split(",") + config.non_members.split(",")
    return "val" if "val" in splits and _are_splits(config.members) and "val" not in attacked else "none"


def _check_apart(config: AuditConfig, apart: Tensor, index: Tensor, named: str) -> None:
    if bool(torch.isin(apart, index).any()):
        if config.population == "auto":
            rule = f"share no example with the population, which is {named} unless --population names another"
            fail("audit", "members and non_members", rule, f"{config.members} and {config.non_members}")
        fail("audit", "population", "share no example with members and non-members", config.population)


def _examples(name: str, value: str, splits: Splits) -> Any:
    """Indices, or a mask, of the examples that an option names."""
    if _are_splits(value):
        for split in value.split(","):
            if split not in splits:
                fail("audit", name, f"be among the splits of the data, {', '.join(splits)}, or a file", split)
        return torch.cat([torch.arange(*splits[split]) for split in value.split(",")])
    path = Path(value)
    if path.suffix.lower() not in SUFFIXES:
        fail("audit", name, "be splits of the data, or an .npy, .txt or .csv file", value)
    return read_members(path, name)


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        fail("audit", "population", "be splits, a share in (0, 1), none or auto", value)
    return share


def _are_splits(value: str) -> bool:
    return all(part in SPLITS for part in value.split(","))
