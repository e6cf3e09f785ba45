"""Ready images, drawn elsewhere by whatever generator: each period is a random subset of them."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from kr_fast.data import folders, load_uncut
from kr_fast.data.npz import read_labelled
from kr_fast.ensemble.shadows import data_digest
from kr_fast.recycling.drawing import Draw, KeptSets, Set, keeping
from kr_fast.recycling.given.interface import ASKED, DataFacts
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError, fail
from kr_fast.synthesis import LabelPlan


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """``images``: uint8 ``[N, H, W, C]``; ``labels``: int64 ``[N]``, classes of the data."""

    images: Tensor
    labels: Tensor
    device: torch.device
    kind: str
    notes: tuple[str, ...] = ()
    parameters: int = 0
    guided: None = None

    @classmethod
    def load(
        cls,
        path: Path,
        facts: DataFacts,
        device: torch.device,
    ) -> "ImageSource":
        """A folder ``class/image.png`` (with or without splits, which are joined), or an ``.npz`` of one set."""
        if path.is_dir():
            try:
                _, names, parts = load_uncut(path)
            except UserError as error:
                if folders.NO_CLASSES not in str(error):
                    raise
                rule = "be the folder of a run or of a diffusers model, or hold one folder of images for each class"
                fail(*ASKED, rule, f"{path}, which holds no folder")
            if sorted(names) != sorted(facts.class_names):
                rule = f"have a folder for each class, {_listed(facts.class_names)}"
                fail(*ASKED, rule, f"{path} with {_listed(names)}")
            number = torch.tensor([facts.class_names.index(name) for name in names])
            images = torch.cat([part.images for part in parts.values()])
            labels = number[torch.cat([part.labels for part in parts.values()])]
        else:
            images, labels = map(torch.from_numpy, read_labelled(path, *ASKED))
        if tuple(images.shape[1:]) != facts.image_shape:
            fail(*ASKED, f"hold images of the data's shape {list(facts.image_shape)}", list(images.shape[1:]))
        if len(labels) and int(labels.max()) >= len(facts.class_names):
            fail(*ASKED, f"have labels below {len(facts.class_names)}, the number of classes", int(labels.max()))
        if missing := sorted(set(facts.trained) - set(labels.tolist())):
            names = _listed(tuple(facts.class_names[label] for label in missing))
            fail(*ASKED, "hold an image of every class of the training split", f"none of {names}")
        return cls(images, labels, device, f"{len(labels)} ready images")

    def digest(self) -> str:
        """Of pixels and labels."""
        return data_digest(self.images, self.labels)

    def draw(self, sampling: Sampling, plan: LabelPlan, images: int, seed: int, kept: KeptSets | None) -> Draw:
        """See :class:`Subsets`."""
        return keeping(Subsets(self, plan, images, seed), kept)

    def shortage(self, plan: LabelPlan, images: int) -> list[str]:
        """A note if the first period asks for more images of a class than there are."""
        asked = plan.labels(torch.arange(images)).bincount(minlength=plan.num_classes)
        there = self.labels.bincount(minlength=plan.num_classes)
        short = (asked > there).nonzero()[:, 0].tolist()
        if not short:
            return []
        most = max(short, key=lambda label: float(asked[label] / there[label]))
        return [
            f"the given images are fewer than a period of {images} has of {len(short)} of {plan.num_classes} classes "
            f"({there[most]} for {asked[most]} at the most): those are drawn more than once in a period"
        ]


@dataclasses.dataclass(frozen=True)
class Subsets:
    """Draws ``images`` per period: of each class of the plan a random subset, without replacement while it lasts.

    An id is the number of an image in the source. A subset is a function of (seed, period, class).
    """

    source: ImageSource
    plan: LabelPlan
    images: int
    seed: int

    def __call__(self, period: int) -> Set:
        labels = self.plan.labels(torch.arange(period * self.images, (period + 1) * self.images))
        ids = torch.empty_like(labels)
        for label in labels.unique().tolist():
            rows, own = (labels == label).nonzero()[:, 0], (self.source.labels == label).nonzero()[:, 0]
            random = seeds.generator(self.seed, "ready images", period, label)
            turns = [torch.randperm(len(own), generator=random) for _ in range(-(-len(rows) // len(own)))]
            ids[rows] = own[torch.cat(turns)[: len(rows)]]
        return ids, labels, self.source.images[ids].to(self.source.device)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")
