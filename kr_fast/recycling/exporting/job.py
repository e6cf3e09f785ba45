"""``kr-fast export``: the Student and the synthetic images of a finished run, in a folder that may be handed on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kr_fast.models import load_student
from kr_fast.recycling.exporting import finished_run, programs, student_folder, synthetic_set
from kr_fast.runtime import state
from kr_fast.runtime.storage import files

STUDENT, SYNTHETIC = "student", "synthetic"


@dataclasses.dataclass(frozen=True)
class Exported:
    """The folders of an export; ``images``: format, count, column and files of the synthetic set."""

    student: Path
    synthetic: Path
    images: dict[str, Any]
    metrics: dict[str, Any]


def export_run(
    run: str | Path, out: str | Path, *, format: str = "parquet", onnx: bool = False, torch_export: bool = False
) -> Exported:
    """Write ``out/student`` and ``out/synthetic``, both at once or nothing. Of several ranks the first does so.

    Args:
        run: folder of a finished run, in which nothing is changed.
        out: folder that is new or empty.
        format: of the synthetic set, parquet (a Hugging Face data set), webdataset or npz.
        onnx, torch_export: also write the Student as such a program, which is compared with it first.
    Returns: the same on every rank.
    Raises: UserError naming what does not fit, before anything is written.
    """
    runtime, done = state.current(), None
    with runtime.main_first() as main:
        if main:
            done = _export(run, out, format, onnx, torch_export)
    return runtime.broadcast(done)


def _export(run: str | Path, out: str | Path, format: str, onnx: bool, torch_export: bool) -> Exported:
    source, out = finished_run.open_run(run), Path(out)
    finished_run.check_out(source, out)
    synthetic_set.check(format)
    if onnx:
        programs.check_packages()
    further = (
        {programs.ONNX: "the Student as an ONNX model, images (uint8) to probabilities and logits"} if onnx else {}
    )
    if torch_export:
        further[programs.PROGRAM] = "the same as a program of torch.export"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(out.resolve().parent)  # of an export that was killed
    with files.atomic_folder(out) as temporary:
        student_folder.write(temporary / STUDENT, source.metrics, source.folder.student, further)
        if further:
            _write_programs(temporary / STUDENT, source, onnx, torch_export)
        facts = synthetic_set.write(temporary / SYNTHETIC, source, format)
        if source.folder.guaranteed:
            ledger = source.folder.privacy_ledger
            files.write_bytes(temporary / ledger.name, ledger.read_bytes())
    return Exported(out / STUDENT, out / SYNTHETIC, facts, source.metrics)


def _write_programs(folder: Path, run: finished_run.FinishedRun, onnx: bool, torch_export: bool) -> None:
    student, images = load_student(folder), torch.from_numpy(np.load(run.folder.images)[: max(programs.COUNTS)])
    program = programs.traced(student)
    if torch_export:
        programs.write_program(folder / programs.PROGRAM, program, student, images)
    if onnx:
        programs.write_onnx(folder / programs.ONNX, program, student, images)
