"""What the private trainings of Teacher and generator share: logical steps, noise, the state to continue from.

Everything that is random in them is drawn anew from the operating system's entropy, as the Poisson samples and the
noise are: which images a batch holds must not be told from the run's seed, nor what was done with each of them. So a
training that was stopped and continued has other batches than one that was not, and it spends what it spends once: what
was done since the last saved position is lost, and was told to nobody. What was saved and is made anew counts twice.

Nothing here ends by what it meets in a record: that a run came to its end would tell of it. A gradient that is not
finite is left out; weights that are not are saved first, so that no other ones are drawn in their place.

Several processes train together: each draws from its own share of the records, and a step adds their sums. Rank 0 books
and saves. A position is saved between logical batches, so any number of processes continues from it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.privacy import PoissonBatches, make_private
from kr_fast.privacy.accounting import Gaussian
from kr_fast.privacy.ledger import Ledger
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.dp.spending import Spending
from kr_fast.runtime import seeds, state
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.log import logger
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.training import EMA

SAVES = 20  # positions that are saved over a training
CURVE = 100  # points of its curve of losses at most

# (records, generator of random numbers) -> the loss of each row; the rows of a record lie together.
Losses = Callable[[Tensor, torch.Generator], Tensor]


def seed_options(config: RecycleConfig, *names: object) -> dict[str, Any]:
    """``seed`` and ``not_private`` of what draws private noise: none, but where a test asks for a seed."""
    if config.dp_seed < 0:
        return {}
    return {"seed": seeds.derive(config.dp_seed, *names), "not_private": True}


def fresh(config: RecycleConfig, *names: object) -> torch.Generator:
    """Random numbers that nobody can draw again, but where a test asks for a seed."""
    if config.dp_seed >= 0:
        return seeds.generator(config.dp_seed, *names)
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def train(
    config: RecycleConfig,
    name: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    spent: Spending,
    book: Ledger | None,
    *,
    records: int,
    state_path: Path,
    multiplicity: int = 1,
    rate: Callable[[int], float],
    ema: EMA,
) -> dict[str, Any]:
    """Take the steps that ``spent`` has paid for, or those that are left of them, on every rank.

    Args:
        name: "teacher" or "generator".
        losses: of the records of a physical batch.
        book: where rank 0 books the steps before they are taken; None on the others.
        records: of the training split.
        state_path: file to continue from, which stays: the last steps are not taken again if their result is lost.
        multiplicity: rows of a record.
        rate: step -> learning rate.
        ema: of the weights; it moves once a step.
    Returns: ``curves`` (mean loss by step, of real images: nothing that may leave), ``images_per_second``.
    """
    private = make_private(
        network,
        optimizer,
        noise_multiplier=spent.noise_multiplier,
        expected_batch_size=spent.expected_batch_size,
        max_grad_norm=config.dp_max_grad_norm,
        clipping=config.dp_clipping,
        multiplicity=multiplicity,
        ema=ema,
        **seed_options(config, name, "noise"),
    )
    runtime = state.current()
    parts = {"private": private, "network": network, "optimizer": optimizer, "ema": ema}
    first, points = 0, []
    with files.continuing(state_path) as saved:
        if saved is not None:
            for key, value in parts.items():
                value.load_state_dict(saved[key])
            first, points = saved["step"], saved["points"]
    _check_weights(network, name, first)
    mechanism = Gaussian(spent.noise_multiplier, spent.sample_rate, spent.steps)
    every, save = max(spent.steps // CURVE, 1), max(spent.steps // SAVES, 1)

    def book_after(step: int) -> None:
        """The steps up to the next saved position, so that the ledger knows from which on they exist."""
        if book is not None:
            book.book(name, mechanism, step, min(step + save - step % save, spent.steps))

    book_after(first)
    left, draws = spent.steps - first, seed_options(config, name, "batches", first)
    batches = PoissonBatches(records, spent.sample_rate, left, config.dp_physical_batch, **draws)
    seen, drawn, start, part = torch.zeros(2, dtype=torch.float64), 0, time.perf_counter(), 0  # sum of losses, rows
    network.train()
    with bar(spent.steps, name, "step", first) as progress:
        for batch in batches:
            step, part = first + batch.step, part + 1
            each = losses(batch.indices, fresh(config, name, "rows", step, part, runtime.rank))
            private.backward(each, present=batch.present)
            counted = batch.present.repeat_interleave(multiplicity).to(each.device) & each.isfinite()
            seen += torch.tensor([float(each.detach()[counted].sum()), int(counted.sum())], dtype=torch.float64)
            drawn += int(batch.present.sum())
            if not batch.last:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            private.step()
            done, part = step + 1, 0
            progress.update()
            if done % every == 0 or done == spent.steps:
                total, rows = runtime.added(seen).tolist()
                if rows:
                    points.append([done, total / rows])
                    progress.set(loss=total / rows)
                seen.zero_()
            if done % save == 0 or done == spent.steps:
                if runtime.is_main:
                    states = {key: value.state_dict() for key, value in parts.items()}
                    files.save_state(state_path, {**states, "step": done, "points": points})
                _check_weights(network, name, done)
                if done < spent.steps:
                    book_after(done)
    seconds, drawn = time.perf_counter() - start, int(runtime.added(torch.tensor(drawn)))
    left_out = int(runtime.added(torch.tensor(private.not_finite)))
    if left_out and runtime.is_main:
        logger.warning("run: gradients in the training of the private %s were not finite, and left out", name)
    if book is not None:
        book.finish(name)  # before anything is told of the result
    private.restore()
    network.eval()
    curves = {"step": [step for step, _ in points], "loss": [value for _, value in points]}
    return {"curves": curves, "images_per_second": drawn / seconds if drawn else None}


def _check_weights(network: nn.Module, name: str, step: int) -> None:
    """Refuse weights that are not finite: noise is in them, so this tells no more than they do."""
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        rule = f"run: weights of the private {name} must be finite (in another run, take a smaller learning rate)"
        raise UserError(f"{rule}, got others after step {step}")


@torch.no_grad()
def settle(average: EMA) -> None:
    """Give the parameters the values of their averages for good."""
    torch._foreach_copy_(average.parameters, average.averages)
