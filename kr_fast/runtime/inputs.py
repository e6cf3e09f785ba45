"""Arguments that callers give as tensors, numpy arrays or lists: converted in one place, refused in one form."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime.array_files import native
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage.image_rows import ImageRows, Images


def described(value: Any) -> str:
    """A tensor or array by dtype and shape; anything else by its type."""
    if isinstance(value, Tensor | ImageRows):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, list | tuple) else ''}"


def as_tensor(where: str, name: str, value: Any) -> Tensor:
    """A tensor as it is; a numpy array (any byte order) or a list of numbers as a tensor.

    Raises: UserError naming the argument.
    """
    if isinstance(value, Tensor):
        if value.device.type == "meta" or value.layout != torch.strided:
            kind = "on the meta device" if value.layout == torch.strided else str(value.layout).removeprefix("torch.")
            fail(where, name, "be a dense tensor with data", f"{described(value)} ({kind})")
        return value
    rule = "be a tensor, a numpy array or a list of numbers"
    if value is None or isinstance(value, str | bytes | dict | set):
        fail(where, name, rule, described(value))
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(each, Tensor) for each in value):
            return torch.stack(list(value))
        array = native(np.asarray(value))
        if array.dtype.kind not in "biufc":
            fail(where, name, rule, f"{array.dtype} {list(array.shape)}")
        # torch has no negative strides (numpy calls one number with such a stride contiguous) and no read-only memory.
        backward = any(step < 0 for step in array.strides)
        return torch.from_numpy(np.require(array.copy() if backward else array, requirements=["C", "W"]))
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {name} must {rule}, got {described(value)}") from error


def as_labels(where: str, name: str, value: Any, count: int | None = None, classes: int | None = None) -> Tensor:
    """int64 ``[N]`` from integers of any dtype, ``[N]`` or ``[N, 1]``.

    Args:
        count: N, if known.
        classes: labels must lie in [0, classes); None for at least 0.
    Raises: UserError naming the argument.
    """
    labels = as_tensor(where, name, value)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    size = "N" if count is None else count
    whole = not (labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool)
    if not whole or labels.ndim != 1 or (count is not None and len(labels) != count):
        fail(where, name, f"be integers [{size}]", described(value))
    labels = labels.long()
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            fail(where, name, "be at least 0" if classes is None else f"lie in [0, {classes})", f"[{low}, {high}]")
    return labels


def as_images(where: str, name: str, value: Any, shape: tuple[int, ...] | None = None) -> Images:
    """uint8 ``[N, H, W, C]``, of (H, W, C) = ``shape`` where there is one; a set that is not in memory as it is.

    Raises: UserError naming the argument, and what to do with float pixels or ``[N, C, H, W]``.
    """
    images = value if isinstance(value, ImageRows) else as_tensor(where, name, value)
    axes = "H, W, C" if shape is None else ", ".join(map(str, shape))
    got = described(images)
    if images.dtype.is_floating_point:
        got += " (pixels in [0, 1] are made uint8 by (x * 255).round().to(torch.uint8))"
    elif images.dtype != torch.uint8:
        got += " (pixels in [0, 255] are made uint8 by x.to(torch.uint8))"
    elif images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        got += " (x.permute(0, 2, 3, 1) makes [N, H, W, C] of [N, C, H, W])"
    elif images.ndim == 3:
        got += " (x[..., None] adds the channel)"
    fits = images.ndim == 4 and 0 not in images.shape[1:] and (shape is None or tuple(images.shape[1:]) == shape)
    swapped = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
    if images.dtype != torch.uint8 or not fits or swapped:
        fail(where, name, f"be uint8 [N, {axes}]", got)
    return images


def as_groups(where: str, name: str, value: Any, count: int) -> np.ndarray:
    """``[count]`` texts, from texts or integers: a list, a numpy array or a tensor; ``[count, 1]`` is taken too.

    Raises: UserError naming the argument.
    """
    array = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    kinds = {type(each) for each in array.ravel().tolist()}
    if array.shape != (count,) or len(kinds) > 1 or not kinds <= {str, int}:
        fail(where, name, f"be texts or integers [{count}]", described(value))
    return array.astype(str)


def as_integer(where: str, name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A Python integer from any integer, numpy's and a tensor of one too; no bool, no fraction.

    Raises: UserError naming the argument.
    """
    try:
        if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        limits = {"at least": least, "at most": most}.items()
        words = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
        fail(where, name, "be an integer" + (f", {words}" if words else ""), repr(value))
    return number


def as_mask(where: str, name: str, value: Any, ndim: int) -> Tensor:
    """bool of ``ndim`` axes (1: ``[N]``, or ``[N, 1]``; 2: ``[M, N]``), from bool or from numbers that are 0 or 1.

    Raises: UserError naming the argument.
    """
    mask = as_tensor(where, name, value).detach()
    if ndim == 1 and mask.ndim == 2 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != ndim:
        fail(where, name, f"have shape {'[N]' if ndim == 1 else '[M, N]'}", list(mask.shape))
    if mask.dtype == torch.bool:
        return mask
    if not binary(mask):
        other = mask[(mask != 0) & (mask != 1)][0].item()
        fail(where, name, "be bool, or hold 0 and 1 only", f"{described(mask)} with {other:g}")
    return mask != 0


def binary(values: Tensor) -> bool:
    """Whether all numbers are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())
