"""Several given generators together: each draws its part of every period."""

import dataclasses
import hashlib

import torch

from kr_fast.recycling.drawing import Draw, KeptSets, Set, keeping
from kr_fast.recycling.given.images import ImageSource
from kr_fast.recycling.given.interface import Source
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime import seeds
from kr_fast.synthesis import LabelPlan


@dataclasses.dataclass(frozen=True)
class SeveralSources:
    """``sources``: given generators of the same data. Sampling is guided if each of their networks has a null class."""

    sources: tuple[Source, ...]

    @property
    def kind(self) -> str:
        """Of each."""
        return " and ".join(source.kind for source in self.sources)

    @property
    def parameters(self) -> int:
        """Of all networks."""
        return sum(source.parameters for source in self.sources)

    @property
    def guided(self) -> bool | None:
        """None where no source is a network."""
        networks = [source.guided for source in self.sources if source.guided is not None]
        return all(networks) if networks else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Of each, and that they are several."""
        return (
            f"each of the {len(self.sources)} draws an equal part of a period",
            *(note for each in self.sources for note in each.notes),
        )

    def digest(self) -> str:
        """Of each, in order."""
        return hashlib.sha256("\n".join(source.digest() for source in self.sources).encode()).hexdigest()

    def shortage(self, plan: LabelPlan, images: int) -> list[str]:
        """See :class:`kr_fast.recycling.given.images.ImageSource`."""
        parts = zip(self.sources, _parts(images, len(self.sources)), strict=True)
        ready = [(source, count) for source, count in parts if isinstance(source, ImageSource)]
        return [note for source, count in ready for note in source.shortage(plan, count)]

    def draw(self, sampling: Sampling, plan: LabelPlan, images: int, seed: int, kept: KeptSets | None) -> Draw:
        """See :class:`Mixture`."""
        parts = zip(self.sources, _parts(images, len(self.sources)), strict=True)
        draws = [
            source.draw(sampling, plan, count, seeds.derive(seed, "given", index) if index else seed, None)
            for index, (source, count) in enumerate(parts)
            if count
        ]
        return keeping(Mixture(tuple(draws)), kept)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The sets of ``draws``, one after the other; image ``i`` of draw ``k`` of ``n`` has the id ``i * n + k``."""

    draws: tuple[Draw, ...]

    def __call__(self, period: int) -> Set:
        sets = [draw(period) for draw in self.draws]
        ids = torch.cat([each[0] * len(sets) + index for index, each in enumerate(sets)])
        labels, images = (torch.cat([each[part] for each in sets]) for part in (1, 2))
        return ids, labels, images


def _parts(images: int, count: int) -> list[int]:
    """``images`` in ``count`` nearly equal parts, of which the first are the larger ones."""
    return [images // count + (index < images % count) for index in range(count)]
