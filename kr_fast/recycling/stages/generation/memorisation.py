"""Memorisation during training: are synthetic images nearer to training images than to as many held-out ones?

After each checkpoint some images are drawn by the configured sampling. Of each the distance to its nearest validation
image is compared with that to the nearest of as many training images (the idea of the data-copying test of Meehan et
al., "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020). Half of them are nearer to
training images where the generator has learnt what both have in common and nothing more.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kr_fast.data.distances import MOST_BYTES, Rows
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation.sampling import default_sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import ImageRows, Images, rows_of

IMAGES = 256  # that are drawn of a checkpoint: their time is that of a few training steps
DISTANCE_BYTES = 128 << 20  # of synthetic images to all others, who are read once for each block of them
PERMUTATIONS = 200
QUANTILE = 1.959964  # of the normal distribution, for intervals of 95 %


def nearer(synthetic: Tensor, train: Images, held_out: Images, seed: int) -> dict[str, Any]:
    """How many of ``synthetic`` are nearer to training than to held-out images, of which equally many are compared.

    Of ``N`` training images, ``M <= N`` held-out ones and ``k`` training images that are nearer to an image than any
    held-out one, the nearest of ``M`` random training images is nearer with probability ``1 - C(N-k, M) / C(N, M)``.
    ``share`` is its mean over the synthetic images, ties decided by chance: 0.5 where training and held-out images are
    exchangeable. Its standard error is that over random choices of the ``M`` among all ``N + M`` images.

    Args:
        synthetic, train, held_out: uint8 ``[., H, W, C]``; of more held-out than training images some are drawn.
    Returns: ``share``, its ``interval`` (95 %), and ``ratio``: the median distance to the nearest of ``M`` training
        images over that to the nearest held-out one; None where that is 0.
    """
    random = seeds.generator(seed, "memorisation")
    count, total = min(len(train), len(held_out)), len(train) + min(len(train), len(held_out))
    held_out = rows_of(held_out, torch.randperm(len(held_out), generator=random)[:count])
    shuffled = torch.randperm(total, generator=random)  # so that equal distances are ordered by chance
    others = Rows(ImageRows(train, held_out).rows(shuffled))
    of_held_out, of_train = ((shuffled >= len(train)) == side for side in (True, False))
    columns = [of_held_out.nonzero()[:, 0]]
    columns += [torch.randperm(total, generator=random)[:count] for _ in range(PERMUTATIONS)]
    some = of_train.nonzero()[:count, 0]  # by chance, as they were shuffled
    missed, shares, nearest = _none_among(len(train), count), [], []
    blocks = (part.squared_distances(others).double() for _, part in Rows(synthetic).blocks(total, DISTANCE_BYTES))
    for distances in (rows for block in blocks for rows in block.split(max(1, MOST_BYTES // (8 * total)))):
        closer = distances.argsort(dim=1, stable=True).argsort(1)  # how many of all images are nearer than each
        shares.append(torch.stack([1 - missed[closer[:, each].min(1).values] for each in columns]))
        nearest.append(torch.stack([distances[:, each].min(1).values for each in (some, of_held_out)]))
    value, *by_chance = torch.cat(shares, 1).mean(1).tolist()
    reach = QUANTILE * float(torch.tensor(by_chance, dtype=torch.float64).std())
    medians = torch.cat(nearest, 1).median(1).values.sqrt().tolist()
    return {
        "share": value,
        "interval": [max(0.0, value - reach), min(1.0, value + reach)],
        "ratio": medians[0] / medians[1] if medians[1] else None,
    }


def _none_among(total: int, drawn: int) -> Tensor:
    """float64 ``[total + 1]``: the probability that ``drawn`` of ``total`` hold none of k marked ones, by k."""
    left = total - torch.arange(total + 1, dtype=torch.float64)
    ways = torch.lgamma(left + 1) - torch.lgamma((left - drawn).clamp_min(0) + 1)
    none = (ways - (math.lgamma(total + 1) - math.lgamma(total - drawn + 1))).exp()
    return none.masked_fill(left < drawn, 0.0)


class MemorisationMonitor:
    """Measures every checkpoint of the run's generator once, on rank 0, and says where training has to stop.

    Args:
        skipped: steps of checkpoints that no image is drawn from.
    """

    def __init__(self, context: Context, skipped: Sequence[int] = ()):
        self.context, self.skipped = context, skipped
        self.path = context.folder.state / "memorisation.json"
        self.rows: dict[int, dict[str, Any]] = {}  # on rank 0
        self.seen: set[int] = set()

    def __call__(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is above the limit; on every rank."""
        if step in self.skipped:
            return False
        self.seen.add(step)
        with self.context.runtime.main_first() as main:
            if main:
                self._measure(step)
        limit = self.context.config.generator_stop_above
        return self.context.runtime.broadcast(main and self.rows[step]["share"] > limit)

    def _measure(self, step: int) -> None:
        """As it was measured before a stop, or anew."""
        context, record = self.context, files.read_json(self.path, dict) if self.path.exists() else {}
        made_from = self._made_from(step)
        if record.get(str(step), {}).get("made_from") != made_from:
            _, _, images = gkd.drawn(context, default_sampling(context, step), self._images())(0)
            sets = (images.cpu(), context.data.train.images, context.data.val.images)
            row = nearer(*sets, seeds.derive(context.config.seed, "memorisation", step))
            record[str(step)] = {"made_from": made_from, **row}
            files.write_json(self.path, record)
        self.rows[step] = {"step": step, **{key: record[str(step)][key] for key in ("share", "interval", "ratio")}}

    def _images(self) -> int:
        ledger = self.context.ledger
        return IMAGES if ledger is None else min(IMAGES, ledger.trial_images)  # a round takes no longer than they do

    def _made_from(self, step: int) -> dict[str, str]:
        folder = self.context.folder
        left = folder.generators if self.context.config.generator else folder.generator(step)
        return {str(path.relative_to(left)): files.sha256(path) for path in sorted(left.rglob("*")) if path.is_file()}

    def results(self, trained: dict[str, Any]) -> dict[str, Any]:
        """What the stage returns, with the figures, and without the checkpoints above the limit; on every rank.

        The first checkpoint stays, whatever its figure: a run has to have one.
        """
        for step in trained["checkpoints"]:
            if step not in self.seen:
                self(step)
        if not self.context.runtime.is_main:
            return trained
        limit, steps, notes = self.context.config.generator_stop_above, trained["checkpoints"], []
        rows = [self.rows[step] for step in steps]
        kept = [row["step"] for row in rows if row["share"] <= limit]
        if not kept:
            kept = steps[:1]
            notes.append(
                f"already at the generator's first checkpoint {rows[0]['share']:.3f} of its images are nearer to "
                f"training images, more than generator_stop_above, {limit:g}: it is used all the same"
            )
            logger.warning("run: %s", notes[0])
        compared = min(len(self.context.data.train), len(self.context.data.val))
        figures = {"images": self._images(), "compared": compared, "limit": limit, "rows": rows}
        self.path.unlink(missing_ok=True)
        return {**trained, "checkpoints": kept, "notes": notes, "memorisation": figures}
