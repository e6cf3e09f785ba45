"""M models of one architecture as one object: logits ``[M, N, C]`` and membership signals ``[A, N, M]``."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ops.membership_signals import membership_signals
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.progress import bar

# Queries of an attack: (flip, shift down, shift right).
AUGMENTS = {
    "none": ((False, 0, 0),),
    "flip": ((False, 0, 0), (True, 0, 0)),
    "shift": ((False, 0, 0), (False, 1, 0), (False, -1, 0), (False, 0, 1), (False, 0, -1)),
}


class ModelArray:
    """Models that are asked together.

    Args:
        models: at least one ``nn.Module`` of one architecture and class count, all on one device.
    Raises: UserError naming the first parameter that differs, or holds a non-finite number.
    """

    def __init__(self, models: Sequence[nn.Module]):
        if len(models) == 0:
            fail("ModelArray", "models", "hold at least one model", 0)
        self.models = [model.eval() for model in models]
        first = self.models[0].state_dict()
        for index, model in enumerate(self.models):
            _compare(first, model.state_dict(), index)
        self.device = next(self.models[0].parameters()).device

    def __len__(self) -> int:
        return len(self.models)

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch_size: int = 1024) -> Tensor:
        """Logits: uint8 ``[N, H, W, C]`` -> float32 ``[M, N, classes]``, on the models' device."""
        _check_images(images)
        rows = []
        for model in self.models:
            parts = [model(to_float(part.to(self.device))).float() for part in images.split(batch_size)]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    @torch.inference_mode()
    def signals(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        augment: str = "none",
        want: tuple[str, ...] = ("phi",),
        batch_size: int = 1024,
        description: str | None = None,
    ) -> dict[str, Tensor]:
        """Membership signals of every model for every query: name -> float32 ``[A, N, M]`` on the CPU.

        Logits exist only for one batch of one model and query at a time.

        Args:
            images: uint8 ``[N, H, W, C]``.
            labels: int64 ``[N]``.
            augment: the queries: "none" (1), "flip" (2: as is, mirrored) or "shift" (5: as is and one pixel in each
                direction, borders replicated).
            want: names of :func:`kr_fast.ops.membership_signals.membership_signals`.
            description: shows a progress bar under this name.
        """
        _check_images(images)
        if augment not in AUGMENTS:
            fail("ModelArray", "augment", f"be one of {', '.join(AUGMENTS)}", augment)
        queries, count = AUGMENTS[augment], len(images)
        out = {name: torch.empty(len(queries), count, len(self)) for name in want}
        steps = len(range(0, count, batch_size)) * len(queries)
        with bar(steps, description, "batch") if description else contextlib.nullcontext() as progress:
            for start in range(0, count, batch_size):
                part, y = images[start : start + batch_size], labels[start : start + batch_size].to(self.device)
                for a, query in enumerate(queries):
                    x = to_float(_query(part.to(self.device), *query))
                    for m, model in enumerate(self.models):
                        found = membership_signals(model(x).float(), y, want)
                        for name, values in found.items():
                            out[name][a, start : start + len(y), m] = values.cpu()
                    if progress is not None:
                        progress.update()
        return out


def _query(images: Tensor, flip: bool, down: int, right: int) -> Tensor:
    if flip:
        images = images.flip(2)
    if down or right:
        height, width = images.shape[1:3]
        rows = (torch.arange(height, device=images.device) - down).clamp_(0, height - 1)
        columns = (torch.arange(width, device=images.device) - right).clamp_(0, width - 1)
        images = images[:, rows][:, :, columns]
    return images


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8:
        fail("ModelArray", "images", "be uint8 [N, H, W, C]", f"{images.dtype} {list(images.shape)}")


def _tensors(state: dict) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _compare(first: dict, other: dict, index: int) -> None:
    if list(first) != list(other):
        name = next(iter(set(first) ^ set(other)), "order of parameters")
        raise UserError(
            f"ModelArray: models must share one architecture, got {name} in only one of models 0 and {index}"
        )
    for name, value in _tensors(other):
        if value.shape != first[name].shape:
            shapes = f"{list(first[name].shape)} and {list(value.shape)}"
            raise UserError(f"ModelArray: models must share one architecture, got {name} {shapes} in 0 and {index}")
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise UserError(f"ModelArray: weights must be finite, got {name} of model {index} with NaN or inf")
