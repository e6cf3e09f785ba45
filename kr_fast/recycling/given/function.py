"""A function of the user's that draws images of given classes, such as a GAN: ``pkg.mod:name``."""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kr_fast.ensemble.loading import imported
from kr_fast.ensemble.networks import error_text
from kr_fast.recycling.drawing import Draw, KeptSets, Set, keeping
from kr_fast.recycling.given.interface import ASKED, DataFacts
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_tensor, described
from kr_fast.synthesis import LabelPlan
from kr_fast.synthesis.networks import tensor_digest

TRIED = 16  # images that are drawn before anything begins
ROUNDING = 1e-3  # by which floats may exceed [-1, 1]


@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """``function(labels, ids=..., seed=...)``, with those of the two keywords that it takes.

    Its images, uint8 or float in [-1, 1] ``[n, C, H, W]``, should be a function of label, id and seed.
    """

    function: Callable[..., Any]
    name: str
    takes: tuple[str, ...]
    shape: tuple[int, int, int]
    device: torch.device
    micro_batch: int
    notes: tuple[str, ...] = ()
    tried: str = ""
    kind: str = "a function"
    parameters: int = 0
    guided: None = None

    @classmethod
    def load(
        cls,
        name: str,
        facts: DataFacts,
        device: torch.device,
        micro_batch: int,
    ) -> "FunctionSource":
        """Import the function, and draw a few images twice."""
        function = imported(*ASKED, name, "function")
        if not callable(function):
            fail(*ASKED, "name a function of labels that returns images", f"{name}, which is {described(function)}")
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:  # of a built-in one
            rule = "name a function whose parameters can be seen"
            raise UserError(f"run: generator must {rule}, got {name} ({error})") from error
        every = any(each.kind is each.VAR_KEYWORD for each in parameters)
        takes = tuple(key for key in ("ids", "seed") if every or any(each.name == key for each in parameters))
        source = cls(function, name, takes, facts.image_shape, device, micro_batch)
        ids, labels = torch.arange(TRIED), torch.tensor(facts.trained)[torch.arange(TRIED) % len(facts.trained)]
        returned, notes = source._returned(labels, ids, 0), []
        if returned.is_floating_point() and float(returned.min()) >= 0:
            words = "whose floats are read as black at -1 and white at 1"
            notes.append(
                f"the given function, {words}, drew {TRIED} images without a value below 0 (are they of [0, 1]?)"
            )
        first, again = _as_bytes(returned, device), source.images(labels, ids, 0)
        if not (repeats := torch.equal(first, again)):
            words = "does not draw the same images again for the same labels, ids and seed"
            notes.append(f"the given function {words}: a run that is continued differs from one that was not stopped")
        return dataclasses.replace(source, notes=tuple(notes), tried=tensor_digest(first) if repeats else "")

    def digest(self) -> str:
        """Of its name and of the images that were tried."""
        return hashlib.sha256(f"{self.name} {self.tried}".encode()).hexdigest()

    def images(self, labels: Tensor, ids: Tensor, seed: int) -> Tensor:
        """uint8 ``[n, H, W, C]``. Raises: UserError with the function's own words, or naming what it returned."""
        return _as_bytes(self._returned(labels, ids, seed), self.device)

    def _returned(self, labels: Tensor, ids: Tensor, seed: int) -> Tensor:
        """What the function returns, checked: uint8 or float in [-1, 1] ``[n, C, H, W]``."""
        # Copies, which it may change.
        offered = {"ids": ids.to(self.device, copy=True), "seed": seed}
        try:
            with torch.no_grad():
                result = self.function(labels.to(self.device, copy=True), **{key: offered[key] for key in self.takes})
        except (Exception, SystemExit) as error:  # of the user's code
            rule = f"draw images of {len(labels)} labels"
            raise UserError(f"run: generator must {rule}, got the error {error_text(error)}") from error
        height, width, channels = self.shape
        images = as_tensor(*ASKED, result)
        expected = [len(labels), channels, height, width]
        if list(images.shape) != expected or not (images.dtype == torch.uint8 or images.is_floating_point()):
            fail(*ASKED, f"return uint8 or float {expected} for {len(labels)} labels", described(result))
        if images.is_floating_point():
            images = images.float()
            low, high = (float(value) for value in images.aminmax())
            if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):  # nor NaN
                fail(*ASKED, "return floats in [-1, 1], or uint8", f"[{low:g}, {high:g}]")
        return images

    def draw(self, sampling: Sampling, plan: LabelPlan, images: int, seed: int, kept: KeptSets | None) -> Draw:
        """See :class:`Calls`."""
        return keeping(Calls(self, plan, images, seeds.derive(seed, "sampling")), kept)


def _as_bytes(images: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[n, H, W, C]``: a copy, for the function's next call may write into the same memory."""
    if images.is_floating_point():
        images = images.clamp(-1, 1).add(1).mul(127.5).round_().to(torch.uint8)
    return images.permute(0, 2, 3, 1).to(device, copy=True, memory_format=torch.contiguous_format)


@dataclasses.dataclass(frozen=True)
class Calls:
    """Draws ``images`` per period, ``micro_batch`` in a call; period ``p`` has the ids from ``p * images`` on."""

    source: FunctionSource
    plan: LabelPlan
    images: int
    seed: int

    def __call__(self, period: int) -> Set:
        ids = torch.arange(period * self.images, (period + 1) * self.images)
        labels, size = self.plan.labels(ids), self.source.micro_batch
        parts = zip(labels.split(size), ids.split(size), strict=True)
        return ids, labels, torch.cat([self.source.images(*part, self.seed) for part in parts])
