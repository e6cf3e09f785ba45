"""The Student as a program without Python code: ONNX, and ``torch.export``. Both are checked before they are left.

Both take ``images``, uint8 ``[N, H, W, C]`` of any N, and give ``probabilities`` and ``logits``, float32 ``[N, K]``:
the normalisation is a part of them.
"""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.models import Student
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import files

ONNX, PROGRAM = "model.onnx", "model.pt2"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of probabilities, and of logits beside the largest one
COUNTS = (1, 3, 64)  # images of the check: one, an odd number, and many


class Outputs(nn.Module):
    """uint8 ``[N, H, W, C]`` -> (probabilities, logits)."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The program."""
        logits = self.student(images)
        return logits.softmax(1), logits


def check_packages() -> None:
    """Refuse to write ONNX without the packages that it needs."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            fail("export", "onnx", f"have {name} installed", f"none ({error}); pip install 'kr-fast[onnx]'")


def traced(student: Student) -> torch.export.ExportedProgram:
    """The program, which names no file of the machine that it was made on."""
    example = torch.zeros(2, *student.image_shape, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Outputs(student.eval()), (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(name, None)
    return program


def write_program(path: Path, program: torch.export.ExportedProgram, student: Student, images: Tensor) -> None:
    """Write what ``torch.export.load(path).module()`` runs."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    _compare(path.name, student, images, lambda part: [each.detach() for each in module(part)])
    files.write_bytes(path, buffer.getbuffer())


def write_onnx(path: Path, program: torch.export.ExportedProgram, student: Student, images: Tensor) -> None:
    """Write the ONNX model, with ``class_names`` and ``image_shape`` as JSON in its metadata."""
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists operators of packages that are not installed
    names = {"input_names": ["images"], "output_names": ["probabilities", "logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's use of itself
        model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    for part in (model.graph, *model.functions):
        del part.metadata_props[:]
        for node in (*part.node, *part.value_info):
            del node.metadata_props[:]  # lines of code, with the files of this machine
            node.doc_string = ""
    for each in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        del each.metadata_props[:]
    facts = {"class_names": student.class_names, "image_shape": student.image_shape}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    data, options = model.SerializeToString(deterministic=True), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    _compare(
        path.name,
        student,
        images,
        lambda part: [torch.from_numpy(each) for each in session.run(None, {"images": part.numpy()})],
    )
    files.write_bytes(path, data)


def _compare(name: str, student: Student, images: Tensor, run: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Refuse a program whose answers are not the Student's; a batch of any size is tried."""
    for count in COUNTS:
        part = images[:count]
        logits = student.logits(part)
        for what, value, got in zip(("probabilities", "logits"), (logits.softmax(1), logits), run(part), strict=True):
            limit = TOLERANCE * max(1.0, float(value.abs().max()))
            difference = float((got - value).abs().max())
            if not difference <= limit:
                rule = f"give the Student's {what} of {len(part)} images to {limit:.2g}"
                raise UserError(f"export: {name} must {rule}, got a difference of {difference:.2g}; leave it out")
