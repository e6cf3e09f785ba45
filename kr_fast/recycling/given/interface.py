"""What a given generator does, what it is checked against, and how an error names it."""

from typing import NamedTuple, Protocol

from kr_fast.recycling.drawing import Draw, KeptSets
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.synthesis import LabelPlan

ASKED = ("run", "generator")  # command and option


class DataFacts(NamedTuple):
    """Of the run's data: ``image_shape`` is (height, width, channels); ``trained``: classes of the training split."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    trained: tuple[int, ...]


class Source(Protocol):
    """A given generator.

    ``kind``: in words; ``parameters``: of a network, else 0; ``guided``: whether it has a null class, None where it is
    no network; ``notes``: what a reader of the run has to know.
    """

    kind: str
    parameters: int
    guided: bool | None
    notes: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of what images follow from, as far as it can be seen."""

    def draw(self, sampling: Sampling, plan: LabelPlan, images: int, seed: int, kept: KeptSets | None) -> Draw:
        """Draws ``images`` of the ``plan`` per period, with the ``sampling`` of a run where it applies."""
