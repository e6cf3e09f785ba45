"""How near each pipeline's synthetic images come to each record, and the attack on them that this calibrates.

With generators retrained on halves every shadow pipeline draws images of its own. Of all of them, and of those of the
last period (which a run releases), the distance to the nearest one is kept for each record of the pool as the sets are
drawn. The run's own images are then attacked by :func:`kr_fast.membership.calibrated_nearest`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data.distances import Rows, nearest
from kr_fast.membership import Choices
from kr_fast.membership.attacks.calibrated import attack_nearest
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import shadows
from kr_fast.runtime import seeds
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

LEVEL = Choices.level  # of the intervals, as in the rest of the audit
IMAGES = ("all_periods", "last_period")  # the rows of a file


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Called with each period's images: updates ``path``, float32 ``[2, N]``, distances to those of all periods so far
    and of this one.

    A period that is drawn again, as after an interruption, changes nothing: an image is a function of its id.
    """

    path: Path
    pool: Rows

    def __call__(self, period: int, images: Tensor) -> None:
        if period and not self.path.exists():
            return  # a version without these files drew the first periods
        now = nearest(self.pool, images.cpu()).float().numpy()
        least = np.minimum(np.load(self.path)[0], now) if period else now
        files.save_array(self.path, np.stack([least, now]))


def shadow_file(context: Context, index: int) -> Path:
    """The distances to the images that shadow Student ``index`` learned from."""
    return context.folder.shadow_students / f"nearest-{index:03d}.npy"


def keeping(context: Context, path: Path) -> Nearest | None:
    """What keeps the distances in ``path``; None in a run whose shadow pipelines have no images of their own."""
    return Nearest(path, Rows(shadows.pool(context)[0])) if context.config.retrains_generators else None


def run(context: Context, index: Tensor) -> dict[str, Any] | None:
    """Figures of the attack; None where a version without these files drew some of the images.

    Args:
        index: of the pool, the examples that the audit did not leave out.
    """
    count, seed = context.config.num_students, seeds.derive(context.config.seed, "attack on nearest images")
    paths = [context.folder.nearest, *(shadow_file(context, k) for k in range(count))]
    if missing := [path for path in paths if not path.exists()]:
        words = "audit: released images are not attacked by other pipelines: a version without it wrote no %s"
        logger.warning(words, missing[0].relative_to(context.out))
        return None
    rows = torch.from_numpy(np.stack([np.load(path) for path in paths]))[:, :, index]
    keep, members = shadows.keep(context)[:count, index], shadows.pool(context)[2][index]
    figures: dict[str, Any] = {"pipelines": count, "level": LEVEL}
    for k, name in enumerate(IMAGES):
        figures[name] = attack_nearest(rows[0, k], members, rows[1:, k], keep, level=LEVEL, seed=seed)
    return figures
