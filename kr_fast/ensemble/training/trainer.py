"""Shadow models trained many at once: one step for all models of a group, each on its own batch of the common pool.

The recipe and the random draws are those of :func:`kr_fast.ensemble.fit`. Images stay uint8 on the device;
a step gathers each model's batch by index arithmetic and is the same sequence of kernels every time, so that on a GPU
it is captured once in a CUDA graph. (A compiler that fuses the step as it likes would choose by the number of models,
and a model's bits would follow from the others.)
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kr_fast.data import AugmentParams, augmented
from kr_fast.ensemble.graph.architecture import Comparison
from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.training.recipe import Steps, TrainConfig, epoch_draws, make_optimizer, mixed, mixed_loss
from kr_fast.ensemble.training.stacked_graph import StackedGraph
from kr_fast.ensemble.training.state import ModelState, TrainingState
from kr_fast.ensemble.training.verify import check
from kr_fast.ensemble.training.workers import Job
from kr_fast.runtime import memory, seeds
from kr_fast.runtime.cuda_graph import capture
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

SHARE = 0.8  # of the free memory that a group may take
PROBE = 4  # images on which a trace is checked


class Setup(NamedTuple):
    """What a group's step runs: the models' forward, in ``dtype``, on ``device``."""

    graph: StackedGraph
    dtype: torch.dtype
    device: torch.device


def graph_of(job: Job) -> StackedGraph:
    """The models' forward for stacks, checked against the first model's own. Raises: Unsupported."""
    model = job.fresh(0)
    tensors = [*model.parameters(), *model.buffers()]
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in tensors):
        raise Unsupported("its weights are not float32")
    if not any(value.requires_grad for value in model.parameters()):
        raise Unsupported("it has nothing to train")
    if int(job.keep.sum(1).min()) < job.config.batch_size:
        raise Unsupported(f"a half has fewer examples than a batch of {job.config.batch_size}")
    graph = StackedGraph(model)
    index = torch.arange(min(PROBE, len(job.labels)))
    check(model, graph, augmented(job.images, index, AugmentParams()), int(job.labels.max()) + 1)
    return graph


def compute_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """None is bfloat16 where the GPU has it; a CPU computes in float32."""
    if precision == "bfloat16" and device.type != "cuda":
        rule = f"be 'float32' where models are trained at once on a {device.type}"
        fail("train_shadows", "precision", rule, repr(precision))
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bfloat16" or (precision is None and fast) else torch.float32


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The schedules of a group: model m takes ``steps[m]`` steps an epoch, of a recipe's ``batch`` images."""

    batch: int
    steps: list[int]
    rates: dict[int, tuple[Tensor, Tensor]]  # steps an epoch -> learning rate and momentum of every step

    @classmethod
    def of(cls, config: TrainConfig, counts: Sequence[int]) -> "Schedules":
        steps = [Steps.of(config, count).per_epoch for count in counts]
        return cls(config.batch_size, steps, {each: _schedule(config, each) for each in set(steps)})

    def table(self, epoch: int) -> Tensor:
        """float32 ``[2, steps + 1, M]``: learning rate and momentum of each step; 0 for models that are through.

        The last row moves no model.
        """
        table = torch.zeros(2, max(self.steps) + 1, len(self.steps))
        for m, count in enumerate(self.steps):
            for kind in range(2):
                table[kind, :count, m] = self.rates[count][kind][epoch * count : (epoch + 1) * count]
        return table


def _schedule(config: TrainConfig, per_epoch: int) -> tuple[Tensor, Tensor]:
    """What the recipe's own scheduler does to learning rate and momentum."""
    count = config.epochs * per_epoch
    optimizer, schedule = make_optimizer(nn.Linear(1, 1, device="meta"), config, count)  # which draws no weights
    steps = []
    for _ in range(count):
        steps.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]])
        optimizer.step()
        schedule.step()
    return tuple(torch.tensor(steps, dtype=torch.float64).float().T)


class GroupTrainer:
    """Models ``indices`` of a job, in training at once."""

    def __init__(self, job: Job, indices: Sequence[int], setup: Setup):
        self.job, self.indices, (self.graph, self.dtype, self.device) = job, list(indices), setup
        models, device = [job.fresh(index) for index in indices], setup.device
        Comparison("train_shadows", f" (of the models {self.indices})").models(models)
        self.state = TrainingState(models, setup.graph, device, job.config.weight_decay)
        self.halves = [job.keep[index].nonzero()[:, 0] for index in indices]
        self.schedules = Schedules.of(job.config, [len(each) for each in self.halves])
        self.seeds = [seeds.derive(job.seed, "shadow", index) for index in indices]
        self.images, self.labels = job.images.to(device), job.labels.to(device)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss = torch.zeros(len(models), device=device)
        self.tables: dict[str, Tensor] = {}
        self.run: Callable[[], None] | None = None

    def draw(self, epoch: int) -> dict[str, Tensor]:
        """Everything random of one epoch and its schedule, ``[steps + 1, M, ...]``, on the CPU."""
        config, size, most = self.job.config, tuple(self.job.images.shape[1:3]), max(self.schedules.steps)
        orders, draws, shares = [], [], []
        for half, seed, steps in zip(self.halves, self.seeds, self.schedules.steps, strict=True):
            order, draw, share = epoch_draws(config, len(half), size, seed, epoch)
            rows = torch.arange((most + 1) * self.schedules.batch)
            rows[steps * self.schedules.batch :] = 0  # of a model that is through
            orders.append(half[order[rows]])
            draws.append(draw[rows])
            shares.append(None if share is None else share[rows])
        drawn = dataclasses.asdict(AugmentParams.stack(draws)) | {"order": torch.stack(orders)}
        drawn["share"] = torch.stack(shares) if config.mixup else None
        tables = {
            name: value.unflatten(1, (most + 1, self.schedules.batch)).transpose(0, 1).contiguous()
            for name, value in drawn.items()
            if value is not None
        }
        tables["rate"], tables["momentum"] = self.schedules.table(epoch)
        return tables

    def begin(self, tables: dict[str, Tensor]) -> None:
        """An epoch's tables to the device, into the same memory every time."""
        for name, value in tables.items():
            if name in self.tables:
                self.tables[name].copy_(value)
            else:
                self.tables[name] = value.to(self.device)
        self.loss.zero_()
        self.clock.zero_()

    def step(self) -> None:
        """One step of all models, at the row of the tables that ``clock`` names; nothing waits for the device."""
        row = {name: table.index_select(0, self.clock)[0] for name, table in self.tables.items()}
        models, batch = row["order"].shape
        draws = AugmentParams(*(row.get(name) for name in ("flip", "move", "matrix"))).map(
            lambda each: each.flatten(0, 1)
        )
        index = row["order"].flatten()
        x = augmented(self.images, index, draws).unflatten(0, (models, batch))
        share, smoothing = row.get("share"), self.job.config.label_smoothing
        logits, seen = self.graph(self.state.tensors, mixed(x, share).to(self.dtype))
        losses = mixed_loss(logits.float(), self.labels[row["order"]], share, smoothing).mean(1)
        grads = torch.autograd.grad(losses.sum(), self.state.leaves())
        self.state.update(grads, seen, row["rate"], row["momentum"])
        self.loss += torch.where(row["rate"] == 0, 0, losses.detach())
        self.clock += 1

    def epoch(self, number: int) -> None:
        """All steps of an epoch, whose tables are here. Raises: UserError naming a model whose loss is not finite."""
        if self.run is None:
            self.run = self.step
            if self.device.type == "cuda":  # needs a GPU
                with torch.cuda.device(self.device):
                    self.run = self.captured()
        for _ in range(max(self.schedules.steps)):
            self.run()
        for index, loss, steps in zip(self.indices, self.loss.tolist(), self.schedules.steps, strict=True):
            if not loss / steps < float("inf"):
                fail("train_shadows", "loss", "be finite", f"{loss / steps} for model {index} in epoch {number}")

    def captured(self) -> Callable[[], None]:
        """The step as a CUDA graph. Warm-ups take the tables' last row, which moves no model."""
        last = max(self.schedules.steps)
        graph = capture(self.step, prepare=lambda: self.clock.fill_(last), compact=True)
        self.clock.zero_()
        return graph.replay

    def model(self, m: int) -> nn.Module:
        """Model ``m`` of the group as a module in eval mode, after all epochs."""
        model = self.job.fresh(self.indices[m]).to(self.device)
        self.state.store(m, model, self.job.config.epochs * self.schedules.steps[m])
        return model.eval()

    def save(self, epoch: int) -> None:
        """Where the group stands, in a file of its own."""
        states = {str(index): self.state.saved(m, epoch) for m, index in enumerate(self.indices)}
        files.save_state(self.state_file, states)

    @property
    def state_file(self) -> Path:
        """Of this group alone: those of groups of other sizes hold models that wait for their turn."""
        return self.job.out / f"training-{self.indices[0]:03d}-{zlib.crc32(repr(self.indices).encode()):08x}.pt"


def memory_of_model(job: Job, graph: StackedGraph, dtype: torch.dtype) -> int:
    """Bytes that one more model of a group takes, from what autograd keeps of a small batch."""
    state = TrainingState([job.fresh(0)], graph, torch.device("cpu"), 0.0)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    index = torch.arange(min(PROBE, len(job.labels)))
    x = augmented(job.images, index, AugmentParams())[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph(state.tensors, x)
    half = dtype.itemsize / 4
    batch = job.config.batch_size / len(index)
    # Activations and, on the way back, the gradients of some; the input as bytes, float32 and in the dtype;
    # weights, velocities, gradients in two places and partial sums of these.
    activations = 1.3 * half * batch * sum(saved.values()) + batch * x.numel() * (5 + 4 * half)
    draws = 2 * int(job.keep.sum(1).max()) * (8 + 1 + 40)
    return int(activations + 24 * state.weight.numel() + draws)


def group_size(job: Job, setup: Setup, requested: int | None) -> int:
    """Models of a group: ``requested``, or as many as fit. Raises: UserError with the size that would fit."""
    each, free = memory_of_model(job, setup.graph, setup.dtype), memory.free_memory(setup.device)
    fits = int((SHARE * free - job.images.numel()) // each)
    if fits < 1:
        most = int(job.config.batch_size * (SHARE * free - job.images.numel()) // each)
        rule = f"be at most about {max(most, 1)} for the {free >> 20} MiB that are free"
        fail("train_shadows", "batch_size", rule, job.config.batch_size)
    if requested is not None and requested > fits:
        fail("train_shadows", "batched", f"be at most {fits} for the {free >> 20} MiB that are free", requested)
    return requested or fits


def unfinished(job: Job, indices: Sequence[int]) -> dict[int, ModelState]:
    """What groups that were cut off have left of the models ``indices``, whichever models they held."""
    states: dict[int, ModelState] = {}
    for path in state_files(job.out) if job.out is not None else ():
        with files.continuing(path) as saved:
            for key, values in (saved or {}).items():
                index, state = int(key), ModelState(**values)
                if index in indices and state.epoch > (states[index].epoch if index in states else 0):
                    states[index] = state
    return states


def state_files(out: Path) -> list[Path]:
    """Files of :meth:`GroupTrainer.save` in ``out``, and no others whose names begin like theirs."""
    return sorted(path for path in out.glob("training-*.pt") if re.fullmatch(r"training-\d{3,}-[0-9a-f]{8}", path.stem))


def train(
    job: Job, indices: Sequence[int], setup: Setup, size: int, save_every: int, done: Callable[[int], None]
) -> Iterator[tuple[int, nn.Module]]:
    """(index, model) of each of ``indices``, in groups of at most ``size``; ``done(n)`` after n epochs of a model.

    Models are saved to ``job.out`` as a group ends, and every ``save_every`` epochs where the group stands.
    """
    saved = unfinished(job, indices)
    by_epoch: dict[int, list[int]] = {}
    for index in indices:
        by_epoch.setdefault(saved[index].epoch if index in saved else 0, []).append(index)
    for first, group in sorted(by_epoch.items(), reverse=True):
        for start in range(0, len(group), size):
            trainer = GroupTrainer(job, group[start : start + size], setup)
            yield from _train(trainer, saved, first, save_every, done)


def _train(
    trainer: GroupTrainer, saved: dict[int, ModelState], first: int, save_every: int, done: Callable[[int], None]
) -> Iterator[tuple[int, nn.Module]]:
    """From epoch ``first`` on, where ``saved`` has what came before."""
    job, indices, epochs = trainer.job, trainer.indices, trainer.job.config.epochs
    for m, index in enumerate(indices):
        if index in saved:
            trainer.state.restore(m, saved[index])
    done(first * len(indices))
    with ThreadPoolExecutor(1) as ahead:  # the next epoch is drawn while this one runs
        tables = ahead.submit(trainer.draw, first) if first < epochs else None
        for epoch in range(first, epochs):
            trainer.begin(tables.result())
            tables = ahead.submit(trainer.draw, epoch + 1) if epoch + 1 < epochs else None
            trainer.epoch(epoch)
            done(len(indices))
            if job.out is not None and (epoch + 1) % save_every == 0 and epoch + 1 < epochs:
                trainer.save(epoch + 1)
    for m, index in enumerate(indices):
        model = trainer.model(m)
        if job.out is not None:
            files.save_tensors(job.path(index), model.state_dict())
        yield index, model
    if job.out is not None:
        trainer.state_file.unlink(missing_ok=True)


def supported(job: Job) -> StackedGraph | None:
    """The graph, or None with one log line that says why models are trained one after the other."""
    try:
        return graph_of(job)
    except Unsupported as reason:
        logger.warning("train_shadows: models are trained one after the other: %s", reason)
        return None
