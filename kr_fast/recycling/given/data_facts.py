"""What a given generator is checked against, and how an error names it."""

from typing import NamedTuple

ASKED = ("run", "generator")  # command and option


class DataFacts(NamedTuple):
    """Of the run's data: ``image_shape`` is (height, width, channels); ``trained``: classes of the training split."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    trained: tuple[int, ...]
