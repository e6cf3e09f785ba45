"""How good a classifier is on a labelled split: what epochs, periods, checkpoints and sampling are chosen by."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kr_fast.data import Split, to_float
from kr_fast.ensemble.networks import answer, device_of, mode
from kr_fast.metrics import macro_auc
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images, as_integer, as_labels, described
from kr_fast.runtime.storage.image_rows import batches

SCORES = ("accuracy", "loss", "auc")
BATCH = 1024  # at most, of small images


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a model on a split; ``value`` is the one that was asked for, higher for better models."""

    accuracy: float
    loss: float
    value: float


def score(model: nn.Module, split: Split, by: str = "accuracy", batch_size: int = BATCH) -> float:
    """How good ``model`` is on ``split``, higher for better ones: the criterion of every choice on validation.

    Args:
        model: from float ``[N, C, H, W]`` to logits; evaluated in eval mode, on its own device.
        split: images uint8 ``[N, H, W, C]`` and labels; for "auc" of at least two classes.
        by: "accuracy", the share that is right; "loss", minus the mean cross-entropy; "auc", :func:`macro_auc` of the
            softmax, which of several checkpoints of about equal accuracy often tells more apart.
        batch_size: images in one call of the model.
    Raises: UserError naming the argument, and for any failure of the model's own code.
    """
    return scores(model, split, by, batch_size).value


def scores(model: nn.Module, split: Split, by: str = "accuracy", batch_size: int = BATCH) -> Scores:
    """:func:`score`, with accuracy and loss of the same pass over the split."""
    if by not in SCORES:
        fail("score", "by", f"be one of {', '.join(SCORES)}", repr(by))
    right, loss, kept = 0, 0.0, []
    for logits, labels in _answers("score", model, split, batch_size):
        right += _right(logits, labels)
        loss += float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        if by == "auc":
            kept.append((logits.double().softmax(1).cpu(), labels.cpu()))
    accuracy, loss = right / len(split), loss / len(split)
    value = macro_auc(*map(torch.cat, zip(*kept, strict=True))) if kept else accuracy if by == "accuracy" else -loss
    return Scores(accuracy, loss, value)


def accuracy(model: nn.Module, split: Split, batch_size: int = BATCH) -> float:
    """Share of ``split`` that the model, in eval mode, classifies correctly, ``batch_size`` images at a time.

    Raises: UserError naming the argument, and for any failure of the model's own code.
    """
    return sum(_right(*pair) for pair in _answers("accuracy", model, split, batch_size)) / len(split)


def logits_of(model: nn.Module, split: Split, batch_size: int = BATCH) -> Tensor:
    """The model's logits ``[N, C]`` of ``split``, in eval mode, on the CPU. Raises: as :func:`accuracy`."""
    return torch.cat([logits.cpu() for logits, _ in _answers("logits_of", model, split, batch_size)])


def _right(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


@torch.inference_mode()
def _answers(where: str, model: nn.Module, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of each batch, on the model's device."""
    if not isinstance(model, nn.Module):
        fail(where, "model", "be a torch module", described(model))
    split, batch_size = examples(where, split), as_integer(where, "batch_size", batch_size, 1)
    device = device_of(model)
    with mode(model, False):
        start = 0
        for images in batches(split.images, batch_size):
            labels = split.labels[start : start + len(images)]
            start += len(images)
            logits = answer(where, "model", model, to_float(images.to(device)))
            as_labels(where, "labels of split", labels, classes=logits.shape[1])
            yield logits, labels.to(device)


def examples(
    where: str, split: Split, classes: int | None = None, shape: tuple[int, ...] | None = None, name: str = "split"
) -> Split:
    """``split`` as tensors, uint8 ``[N, H, W, C]`` and int64 ``[N]`` in [0, classes), of at least one example.

    Raises: UserError naming the argument.
    """
    if not isinstance(split, Split):
        fail(where, name, "be a Split of images and labels", described(split))
    images = as_images(where, f"images of {name}", split.images, shape)
    labels = as_labels(where, f"labels of {name}", split.labels, len(images), classes)
    if len(labels) == 0:
        fail(where, name, "hold at least one example", described(split.images))
    return Split(images, labels)
