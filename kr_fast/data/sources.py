"""Where images come from: scikit-learn's digits, a MedMNIST-layout ``.npz``, or a folder ``class/image.png``."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.reprs import ShortRepr

SIZES = (8, 224)
CLASSES = (2, 1000)
VAL_FRACTION, TEST_FRACTION = 0.15, 1 / 3  # where a set has no such split: of the training images, of all images
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True, repr=False)
class Split(ShortRepr):
    """``images``: uint8 ``[N, H, W, C]``; ``labels``: int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset(ShortRepr):
    """A named set with three disjoint splits. Choices are made on ``val``; ``test`` is read once, at the end."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return tuple(self.train.images.shape[1:])


def to_float(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, C]`` -> float32 ``[N, C, H, W]`` in [-1, 1], channels_last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def load(
    source: str | Path, *, seed: int = 0, val_fraction: float = VAL_FRACTION, test_fraction: float = TEST_FRACTION
) -> Dataset:
    """Read ``source`` and cut what it does not split itself, stratified by class.

    Args:
        source: ``"digits"``, a ``.npz`` file with ``{train,val,test}_{images,labels}`` (``val`` may be missing), or a
            folder with one sub-folder of images for each class (or ``train/``, ``val/``, ``test/`` of such).
        seed: decides the cuts.
        val_fraction: share of the training images that becomes the validation split where the source has none.
        test_fraction: share of all images that becomes the test split where the source has none.
    Raises: UserError naming the argument, its rule and the value; FileNotFoundError for a missing path.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            fail("data", name, "be in (0, 1)", value)
    name, parts, class_names = _read(source)
    parts = _cut(parts, val_fraction, test_fraction, seed)
    splits = [Split(*map(torch.from_numpy, parts[which])) for which in ("train", "val", "test")]
    dataset = Dataset(name, class_names, *splits)
    _validate(dataset)
    return dataset


def load_uncut(source: str | Path) -> tuple[str, tuple[str, ...], dict[str, Split]]:
    """(name, class names, split -> images in the order of the source): as :func:`load`, but nothing is cut.

    A source without splits has one, "all"; digits is one. Raises: as :func:`load`.
    """
    name, parts, class_names = _read(source)
    splits = {which: Split(*map(torch.from_numpy, part)) for which, part in parts.items()}
    first = next(iter(splits.values()))
    for which, split in splits.items():
        if split.images.shape[1:] != first.images.shape[1:]:
            shapes = f"{list(split.images.shape[1:])} beside {list(first.images.shape[1:])}"
            fail("data", f"{which} images", "have the shape of the first split", shapes)
    return name, class_names, splits


def _read(source: str | Path):
    """(name, split -> (images, labels), class names)."""
    if str(source) == "digits":
        return "digits", *_digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data: source must be digits, a .npz file or a folder of images, got {source}")
    if path.is_dir():
        return path.name, *_folder(path)
    if path.suffix == ".npz":
        return path.stem, *_npz(path)
    fail("data", "source", "be digits, a .npz file or a folder of images", source)


def _digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return {"all": (images, bunch.target.astype(np.int64))}, tuple(str(digit) for digit in range(10))


def _npz(path: Path):
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"data: source must be a readable .npz file, got {path} ({type(error).__name__})") from error
    needed = [f"{which}_{what}" for which in ("train", "test") for what in ("images", "labels")]
    missing = [key for key in needed if key not in arrays]
    if missing:
        fail("data", "source", f"hold the keys {', '.join(needed)}", f"{path} without {', '.join(missing)}")
    parts = {}
    for which in ("train", "val", "test"):
        if f"{which}_images" in arrays:
            if f"{which}_labels" not in arrays:
                fail("data", "source", f"hold {which}_labels beside {which}_images", path)
            images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
            parts[which] = (_pixels(images, f"{which}_images"), _labels(labels, len(images), f"{which}_labels"))
    classes = 1 + max(int(labels.max(initial=0)) for _, labels in parts.values())
    return parts, tuple(str(index) for index in range(classes))


def _pixels(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        fail("data", name, "have shape [N, H, W], [N, H, W, 1] or [N, H, W, 3]", list(images.shape))
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        fail("data", name, "be uint8, or float in [0, 1] or [0, 255]", images.dtype)
    if not np.isfinite(images).all():
        fail("data", name, "hold finite pixels", f"{int((~np.isfinite(images)).sum())} that are not")
    low, high = float(images.min(initial=0)), float(images.max(initial=0))
    if low < 0 or high > 255:
        fail("data", name, "lie in [0, 1] or [0, 255]", f"[{low}, {high}]")
    return np.round(images * (255 if high <= 1 else 1)).astype(np.uint8)


def _labels(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        fail("data", name, f"have shape [{count}] or [{count}, 1] (one class an image)", list(labels.shape))
    if not np.issubdtype(labels.dtype, np.integer):
        fail("data", name, "be integers", labels.dtype)
    labels = labels.astype(np.int64)
    if count and not 0 <= labels.min() <= labels.max() < CLASSES[1]:
        fail("data", name, f"lie in [0, {CLASSES[1]})", f"[{labels.min()}, {labels.max()}]")
    return labels


def _folder(path: Path):
    below = sorted(child.name for child in path.iterdir() if child.is_dir())
    if "train" in below and "test" in below:
        roots = {which: path / which for which in ("train", "val", "test") if which in below}
    else:
        roots = {"all": path}
    first = next(iter(roots.values()))
    class_names = tuple(sorted(child.name for child in first.iterdir() if child.is_dir()))
    parts = {}
    for which, root in roots.items():
        found = {child.name for child in root.iterdir() if child.is_dir()}
        if unknown := sorted(found - set(class_names)):
            fail("data", f"{which} class folders", f"be among those of {first}", unknown[0])
        files = [
            (file, label)
            for label, name in enumerate(class_names)
            if (root / name).is_dir()
            for file in sorted((root / name).iterdir())
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            fail("data", "source", "hold images as class/image.png", root)
        parts[which] = (_read_images(files), np.array([label for _, label in files], dtype=np.int64))
    return parts, class_names


def _read_images(files: list[tuple[Path, int]]) -> np.ndarray:
    from PIL import Image

    images = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "LA", "I;16")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except OSError as error:
            raise UserError(f"data: image must be readable, got {file} ({error})") from error
        images.append(pixels[..., None] if grey else pixels)
        if images[-1].shape != images[0].shape:
            rule = f"have the size and channels of the first, {list(images[0].shape)}"
            fail("data", "every image", rule, f"{list(images[-1].shape)} in {file}")
    return np.stack(images)


def _cut(parts: dict, val_fraction: float, test_fraction: float, seed: int) -> dict:
    if "all" in parts:
        parts["train"], parts["test"] = _stratified(parts.pop("all"), test_fraction, seed)
    if "val" not in parts:
        parts["train"], parts["val"] = _stratified(parts["train"], val_fraction, seed)
    return parts


def _stratified(part: tuple[np.ndarray, np.ndarray], fraction: float, seed: int):
    """(rest, cut): ``fraction`` of each class is cut, and at least one image of each class stays."""
    images, labels = part
    random = np.random.default_rng(seed)
    cut = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cut[members[: min(round(len(members) * fraction), len(members) - 1)]] = True
    return (images[~cut], labels[~cut]), (images[cut], labels[cut])


def _validate(dataset: Dataset) -> None:
    height, width, _ = dataset.image_shape
    if not (SIZES[0] <= height <= SIZES[1] and SIZES[0] <= width <= SIZES[1]):
        fail("data", "image size", f"be {SIZES[0]} to {SIZES[1]} px on both sides", f"{height} x {width}")
    for which in ("train", "val", "test"):
        split = getattr(dataset, which)
        if split.images.shape[1:] != dataset.train.images.shape[1:]:
            shapes = f"{list(split.images.shape[1:])} beside {list(dataset.image_shape)}"
            fail("data", f"{which} images", "have the shape of the training images", shapes)
        if len(split) == 0:
            fail("data", f"{which} split", "hold at least one image", 0)
    if not CLASSES[0] <= dataset.num_classes <= CLASSES[1]:
        fail("data", "number of classes", f"be {CLASSES[0]} to {CLASSES[1]}", dataset.num_classes)
    counts = torch.bincount(dataset.train.labels, minlength=dataset.num_classes)
    if empty := torch.nonzero(counts == 0).flatten().tolist():
        names = ", ".join(dataset.class_names[index] for index in empty[:5])
        fail("data", "every class", "have a training image", f"none of {names}")
