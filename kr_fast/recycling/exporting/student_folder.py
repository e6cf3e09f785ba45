"""The Student as a folder that stands alone: :func:`kr_fast.load_student` reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr_fast.models.student import CONFIG, WEIGHTS, save_student
from kr_fast.report.exported import model_card
from kr_fast.runtime.storage import files

CARD = "README.md"
CONTENT = {WEIGHTS: "the weights", CONFIG: "architecture, shape of the images, classes, normalisation of pixels"}


def write(folder: Path, summary: Mapping[str, Any], weights: Path, further: Mapping[str, str] | None = None) -> None:
    """Write weights, ``config.json`` and the model card.

    Args:
        summary: the dictionary of metrics.json.
        weights: the run's file of them.
        further: name -> what it is, of files that the folder holds besides.
    """
    data, config = summary["dataset"], summary["config"]
    save_student(
        folder,
        files.load_tensors(weights),
        architecture=config["student_arch"],
        width=config["student_width"],
        image_shape=(data["height"], data["width"], data["channels"]),
        class_names=data["class_names"],
    )
    files.write_text(folder / CARD, model_card.text(summary, {**CONTENT, **(further or {})}))
