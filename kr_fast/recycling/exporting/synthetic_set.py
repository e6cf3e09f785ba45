"""The synthetic images of a run as a data set that others open, with what the Student was taught of each."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kr_fast.recycling.exporting import teacher_answers
from kr_fast.recycling.exporting.finished_run import FinishedRun
from kr_fast.report.exported import croissant, data_card
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis.output.sinks import Column, Output, ParquetSink, Sink, TarSink

CARD, METADATA = "README.md", "croissant.json"
FORMATS = ("parquet", "webdataset", "npz")
SHARD_BYTES = 256 << 20  # of pixels in a file
BATCH_BYTES = 16 << 20  # of pixels in a row group


def write(folder: Path, run: FinishedRun, format: str) -> dict[str, Any]:
    """Write the files of the set, its data card and its Croissant metadata.

    Columns: ``image`` (PNG), ``label`` (the class that the image was drawn for), ``id`` (its position in the set) and
    that of :func:`teacher_answers.of_images`. In an ``.npz`` the arrays ``images``, ``labels``, and ``soft_labels``
    ``[N, K]`` or ``teacher_labels`` ``[N]``.

    Returns: ``format``, ``count``, ``column`` (the name of the Teacher's answers, None without) and ``files`` (path in
        the folder, bytes and SHA-256 of each).
    """
    images, labels = (torch.from_numpy(np.load(path)) for path in (run.folder.images, run.folder.labels))
    answers = teacher_answers.of_images(run, images)
    column = next((each.name for each in answers), None)
    names = run.metrics["dataset"]["class_names"]
    if format == "npz":
        written = [_write_npz(folder, images, labels, answers)]
    else:
        columns = tuple(answers)
        sink = ParquetSink(names, columns, "export") if format == "parquet" else TarSink(columns)
        written = _write_shards(folder / "data", sink, images, labels, len(names), tuple(answers.values()))
    facts = {"format": format, "count": len(images), "column": column, "shape": list(images.shape[1:])}
    facts["counts"] = labels.bincount(minlength=len(names)).tolist()
    facts["files"] = [{**each, "path": each["path"].relative_to(folder).as_posix()} for each in written]
    files.write_text(folder / CARD, data_card.text(run.metrics, facts))
    files.write_json(folder / METADATA, croissant.metadata(run.metrics, facts))
    return facts


def _write_npz(folder: Path, images: Any, labels: Any, answers: dict[Column, Any]) -> dict[str, Any]:
    arrays = {"images": images, "labels": labels, **{f"{column.name}s": each for column, each in answers.items()}}
    path = folder / "train.npz"
    files.save_arrays(path, {name: each.numpy() for name, each in arrays.items()})
    return {"path": path, "bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _write_shards(
    folder: Path, sink: Sink, images: Any, labels: Any, classes: int, further: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """``train-00000-of-00003`` and so on; the bytes of a file depend on its images alone."""
    folder.mkdir(parents=True)
    per_image = images[0].numel()
    shard, batch = max(SHARD_BYTES // per_image, 1), max(BATCH_BYTES // per_image, 1)
    starts, written = range(0, len(images), shard), []
    for number, start in enumerate(starts):
        path = folder / f"train-{number:05d}-of-{len(starts):05d}{sink.suffixes[0]}"
        ids = torch.arange(start, min(start + shard, len(images)))
        output = Output(path)
        try:
            writer = sink.writer([output], len(ids), tuple(images.shape[1:]), classes)
            for part in ids.split(batch):
                writer.write(part, labels[part], images[part], *(each[part] for each in further))
            writer.close()
            output.close()
        finally:
            output.give_up()
        written.append({"path": path, "bytes": output.size, "sha256": output.sha256()})
    return written


def check(format: str) -> None:
    """Refuse a format that this installation cannot write."""
    if format not in FORMATS:
        raise UserError(f"export: format must be one of {', '.join(FORMATS)}, got {format}")
    if format == "parquet":
        ParquetSink(where="export")
