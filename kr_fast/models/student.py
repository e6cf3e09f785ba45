"""A Student in a folder of its own: weights, classes and normalisation, read without any other part of a run.

``config.json`` holds the architecture, ``image_shape``, ``class_names`` and the normalisation of pixels,
``model.safetensors`` the weights. Nothing in either is run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.models.resnet import CLASSIFIERS, classifier
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.inputs import described
from kr_fast.runtime.storage import files
from kr_fast.runtime.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "kr_fast Student", 1
NORMALISATION = {"divide_by": 127.5, "subtract": 1.0}  # uint8 -> [-1, 1]
MOST = 1 << 20  # of a width and a side, so that no size of a tensor overflows
INSIDE = ("", "student", "release/student")  # of a Student's folder, of an export, of a run
TYPES = {"architecture": str, "width": int, "image_shape": list, "class_names": list, "normalisation": dict}
Images = TypeVar("Images", Tensor, np.ndarray)


class Student(nn.Module):
    """A classifier of uint8 images of one shape.

    Args:
        network: float ``[N, C, H, W]`` -> logits ``[N, K]``.
        image_shape: height, width and channels.
        class_names: of the ``K`` classes, in the order of the logits.
        normalisation: ``divide_by`` and ``subtract``, in this order, of a pixel in [0, 255].
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        class_names: Sequence[str],
        normalisation: Mapping[str, float] = NORMALISATION,
    ):
        super().__init__()
        self.network = network
        self.image_shape, self.class_names = tuple(image_shape), tuple(class_names)
        self.normalisation = dict(normalisation)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[N, H, W, C]`` -> logits float32 ``[N, K]``; the arguments are not checked."""
        x = images.permute(0, 3, 1, 2).float()
        logits: Tensor = self.network(x / self.normalisation["divide_by"] - self.normalisation["subtract"])
        return logits

    def logits(self, images: Images, *, batch_size: int = 256) -> Images:
        """As :meth:`predict`, of ``images`` in parts of ``batch_size``, before the softmax.

        Raises: as :meth:`predict`.
        """
        if batch_size < 1:
            fail("predict", "batch_size", "be at least 1", batch_size)
        pixels, device = self._pixels(images), next(self.parameters()).device
        self.eval()
        with torch.no_grad():
            out = [self(part.to(device)).to(pixels.device) for part in pixels.split(batch_size)]
        logits = torch.cat(out) if len(pixels) else torch.empty(0, len(self.class_names), device=pixels.device)
        return logits if isinstance(images, Tensor) else logits.numpy()

    def predict(self, images: Images, *, batch_size: int = 256) -> Images:
        """Probabilities ``softmax(logits)`` of the classes, float32 ``[N, K]``.

        Args:
            images: uint8 ``[N, H, W, C]``, of grey images ``[N, H, W]`` too, of the shape that the Student was trained
                on; a numpy array or a tensor on any device.
            batch_size: images in one call of the network.
        Returns: of the kind and on the device of ``images``.
        Raises: UserError for any other shape, dtype or kind; nothing is resized or converted unasked.
        """
        logits = self.logits(images, batch_size=batch_size)
        return logits.softmax(1) if isinstance(logits, Tensor) else torch.from_numpy(logits).softmax(1).numpy()

    def _pixels(self, images: Any) -> Tensor:
        height, width, channels = self.image_shape
        pixels = images
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            pixels = torch.from_numpy(np.require(images, requirements=("C", "W")))
        if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
            if pixels.ndim == 3 and channels == 1:
                pixels = pixels[..., None]
            if tuple(pixels.shape[1:]) == self.image_shape:
                return pixels
        shapes = f"[N, {height}, {width}, {channels}]" + (f" or [N, {height}, {width}]" if channels == 1 else "")
        rule = f"be a uint8 array or tensor {shapes}, resized as the training images were"
        got = described(images)
        if type(images).__module__.startswith("PIL."):
            got = f"a PIL image of {images.height} x {images.width} in mode {images.mode}; np.asarray(image)[None] is "
            got += "an array of one image"
        elif isinstance(images, np.ndarray | Tensor) and tuple(images.shape) in (self.image_shape, (height, width)):
            got += "; images[None] is an array of one image"
        fail("predict", "images", rule, got)


def load_student(folder: str | Path, device: str | torch.device = "cpu") -> Student:
    """A Student from its folder, which ``kr-fast run`` and ``kr-fast export`` write.

    Args:
        folder: that of the Student, of an export, or of a run (whose ``release/student`` is taken).
    Returns: the network in eval mode on ``device``, with ``predict(images)`` -> probabilities.
    Raises: UserError naming the file and what is wrong with it.
    """
    path = next((Path(folder) / name for name in INSIDE if (Path(folder) / name / CONFIG).is_file()), None)
    if path is None:
        rule = f"be the folder of a Student ({CONFIG} and {WEIGHTS}), as kr-fast export writes"
        fail("load_student", "folder", rule, f"{folder}" if Path(folder).is_dir() else f"{folder}, which is no folder")
    config = _checked(files.read_json(path / CONFIG, dict), path / CONFIG)
    height, width, channels = config["image_shape"]
    options = {"num_classes": len(config["class_names"]), "in_channels": channels, "width": config["width"]}
    with torch.device("meta"):  # no memory and no time for weights that are replaced
        network = classifier(config["architecture"], **options, image_size=max(height, width))
    try:
        network.load_state_dict(files.load_tensors(path / WEIGHTS), assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).splitlines()[1:2]).strip() or first_line(error)
        rule = f"hold the weights of the {config['architecture']} in {CONFIG}"
        raise UserError(f"load_student: {path / WEIGHTS} must {rule}, got others ({why})") from error
    student = Student(network, config["image_shape"], config["class_names"], config["normalisation"])
    return student.to(device, torch.float32).eval().requires_grad_(False)


def save_student(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    architecture: str,
    width: int,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a :func:`kr_fast.models.classifier` into ``folder``.

    Args:
        metadata: texts in the header of the weights' file.
    """
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kr_fast": __version__,
        "architecture": architecture,
        "width": width,
        "image_shape": list(image_shape),
        "class_names": list(class_names),
        "normalisation": NORMALISATION,
    }
    files.save_tensors(folder / WEIGHTS, weights, metadata)
    files.write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration, whose values are all of the right kinds."""
    what = f"load_student: {path} must"
    if config.get("format") != FORMAT:
        raise UserError(f"{what} be of the format {FORMAT!r}, got {config.get('format')!r}")
    if config.get("version") != VERSION:
        raise UserError(f"{what} be of version {VERSION}, got {config.get('version')!r}; this is kr-fast {__version__}")
    for name, kind in TYPES.items():
        if type(config.get(name)) is not kind:
            raise UserError(f"{what} hold {name} of type {kind.__name__}, got {config.get(name)!r}")
    shape, names, scale = config["image_shape"], config["class_names"], config["normalisation"]
    if config["architecture"] not in CLASSIFIERS:
        raise UserError(f"{what} name one of {', '.join(CLASSIFIERS)}, got {config['architecture']!r}")
    if len(shape) != 3 or not all(type(each) is int and 0 < each <= MOST for each in (*shape, config["width"])):
        rule = f"hold a width and an image_shape of three whole numbers in [1, {MOST}]"
        raise UserError(f"{what} {rule}, got {config['width']!r} and {shape}")
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} hold the names of at least two classes, got {names}")
    known = scale.keys() == NORMALISATION.keys()
    numbers = known and all(type(value) in (int, float) and abs(value) < 1 << 53 for value in scale.values())
    if not numbers or scale["divide_by"] == 0:
        raise UserError(f"{what} hold {' and '.join(NORMALISATION)} of normalisation, got {scale}")
    return config
