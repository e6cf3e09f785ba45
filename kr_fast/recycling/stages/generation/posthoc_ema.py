"""Averages of the generator's weights of any length, from two that are kept while it trains (post-hoc EMA).

Both are saved a few times during the training, in files that are deleted at its end; what stays is a checkpoint of each
length. The lengths and the combination: :mod:`kr_fast.training.ema_profiles`.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.storage import files
from kr_fast.training import PowerEMA
from kr_fast.training.ema import replaced
from kr_fast.training.ema_profiles import coefficients, power_of

KEPT = (0.05, 0.1)  # lengths of the two averages, as in the source
SNAPSHOTS = 24  # of each over a training: in its second half profiles of [0.03, 0.2] are then met within 5 %


@dataclasses.dataclass(frozen=True)
class Average:
    """The average of ``length`` over the first ``step`` steps, as :class:`EMA` has one."""

    kept: "PosthocEMA"
    length: float
    step: int

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within the ``with`` block the parameters have the values of the average."""
        return replaced(self.kept.averages[0].parameters, self.kept.average(self.length, self.step))


class PosthocEMA:
    """The two averages of ``parameters`` over a training of ``steps`` steps, and their snapshots in ``folder``."""

    def __init__(self, parameters: Sequence[Tensor], steps: int, folder: Path):
        self.powers = [power_of(length) for length in KEPT]
        self.averages = [PowerEMA(list(parameters), power) for power in self.powers]
        self.folder, self.at = folder, sorted({-(-steps * k // SNAPSHOTS) for k in range(1, SNAPSHOTS + 1)})

    def step(self) -> None:
        """After a step of the optimizer."""
        for average in self.averages:
            average.step()

    def save(self, step: int, saved_steps: Sequence[int]) -> None:
        """Keep both averages, where a snapshot or one of ``saved_steps`` is due after ``step``."""
        if step in self.at or step in saved_steps:
            tensors = {
                f"{which}.{i}": value
                for which, average in enumerate(self.averages)
                for i, value in enumerate(average.averages)
            }
            files.save_tensors(self._path(step), tensors)

    def average(self, length: float, step: int) -> list[Tensor]:
        """Of each parameter the average of ``length`` over the first ``step`` steps, from the snapshots up to there."""
        steps = [at for at in sorted(self._steps()) if at <= step]
        pairs = [(at, which) for at in steps for which in range(len(KEPT))]
        powers = [self.powers[which] for _, which in pairs]
        weights = iter(coefficients(powers, [at for at, _ in pairs], power_of(length), step).tolist())
        result = [torch.zeros_like(value, dtype=torch.float64) for value in self.averages[0].averages]
        for at in steps:
            kept = files.load_tensors(self._path(at))
            for which in range(len(KEPT)):
                weight = next(weights)
                for i, value in enumerate(result):
                    value += weight * kept[f"{which}.{i}"].to(value)
        return [value.to(like.dtype) for value, like in zip(result, self.averages[0].averages, strict=True)]

    def remove(self) -> None:
        """Delete the snapshots."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def state_dict(self) -> list[dict[str, Any]]:
        """What :meth:`load_state_dict` continues from; the snapshots so far are in their files."""
        return [average.state_dict() for average in self.averages]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Continue from :meth:`state_dict`."""
        for average, values in zip(self.averages, state, strict=True):
            average.load_state_dict(values)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _steps(self) -> list[int]:
        return [int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.safetensors")]
