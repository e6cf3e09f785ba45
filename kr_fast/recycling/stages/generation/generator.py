"""The generator: class-conditional diffusion on diffusers' ``UNet2DModel``, data-parallel under Accelerate.

The rate falls by a cosine to the last step. In a run with a budget, whose last step is not known when training begins,
it stays, and the average of the weights remembers a share of the steps so far (:class:`PowerEMA`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kr_fast.data import Split
from kr_fast.models import unet
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages.generation.augmentation import condition, plain_state
from kr_fast.recycling.stages.generation.generator_loss import batch_loss, make_scheduler
from kr_fast.recycling.stages.generation.posthoc_ema import Average, PosthocEMA
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.synthesis.optimized.optimize import optimize
from kr_fast.training import AdamW, PowerEMA
from kr_fast.training.ema_profiles import power_of
from kr_fast.training.precision import autocast

WARM_UP = 50
LOG_EVERY = 20
SAVE_EVERY = 200
EARLY = 0.25  # of the training
VALIDATION = 8  # batches of the validation loss
WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """``count`` steps, evenly over the second half of the training; the last is the last step."""
    return sorted({math.ceil(steps / 2 + steps / 2 * (k + 1) / count) for k in range(count)})


def early_step(c: RecycleConfig) -> list[int]:
    """The step of a checkpoint that no image is drawn from: the attack on the weights compares later ones with it."""
    if not c.attacks_generator or c.retrains_generators:
        return []
    step = math.ceil(EARLY * c.generator_steps)
    return [step] if step < checkpoint_steps(c.generator_steps, c.checkpoints)[0] else []


def load(path: Path, device: torch.device) -> tuple[Any, Any, str]:
    """(network, scheduler, objective) of a checkpoint."""
    from diffusers import UNet2DModel

    objective = files.read_json(path / "objective.json")["objective"]
    network = UNet2DModel.from_pretrained(path / "unet", local_files_only=True).to(device).eval()
    return network, make_scheduler(objective), objective


def run(context: Context, after: Callable[[int], bool]) -> dict[str, Any]:
    """Train the generator on every rank, save EMA checkpoints, return their steps and the loss curve.

    Args:
        after: of :func:`train`.
    """
    c = context.config
    saved, early = checkpoint_steps(c.generator_steps, c.checkpoints), early_step(c)
    result = train(
        context,
        context.data.train,
        sorted({*saved, *early}),
        context.folder.generator,
        seed=c.seed,
        state_path=context.folder.state / "generator.pt",
        description="generator",
        lengths=dict.fromkeys(saved, c.ema_lengths) if c.ema_lengths else {},
        after=after,
    )
    return {**result, "checkpoints": [step for step in saved if step in result["checkpoints"]], "early": early}


def train(
    context: Context,
    split: Split,
    saved_steps: list[int],
    folder_of: Callable[..., Path],
    *,
    seed: int,
    state_path: Path,
    single_process: bool = False,
    keep_state: bool = False,
    description: str | None = None,
    ema_length: float = 0.0,
    lengths: Mapping[int, Sequence[float]] = MappingProxyType({}),
    after: Callable[[int], bool] | None = None,
) -> dict[str, Any]:
    """Train a generator on ``split`` by the run's recipe, up to the last of ``saved_steps``.

    Args:
        folder_of: step -> folder of that step's checkpoint; (step, length) -> of a further average's.
        seed: of the weights, the batches and the noise.
        single_process: only this process trains; otherwise all ranks train together.
        keep_state: leave the file from which a further call continues beyond the last step.
        ema_length: of the average in checkpoints, as a share of the steps so far; 0 for that of ``generator_ema``.
        lengths: step -> lengths of further averages, each of which is saved as a checkpoint of that step.
        after: called on every rank with the step of a checkpoint that was saved; whether training ends there.
    """
    c, runtime = context.config, context.runtime
    rank, world_size = (0, 1) if single_process else (runtime.rank, runtime.world_size)
    height, width, channels = context.data.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "weights", "generator"))
        options = {"widths": c.generator_widths, "layers": c.generator_layers, "dropout": c.generator_dropout}
        network = unet(height, width, channels, context.data.num_classes, **options)
    condition(network, c)
    network, precision = for_training(context, network), context.precision.generator
    adam = {"lr": c.generator_learning_rate, "weight_decay": 1e-4}
    own = AdamW(network.parameters(), **adam, max_grad_norm=1.0, ema_decay=c.generator_ema)
    if ema_length:
        own.ema = PowerEMA(list(network.parameters()), power_of(ema_length))
    elif c.budget:
        own.ema = PowerEMA(list(network.parameters()))
    ema = own.ema
    trainer = _SingleProcess(context) if single_process else _accelerator()
    network, optimizer = trainer.prepare(network, own)
    plain = trainer.unwrap_model(network)
    posthoc = PosthocEMA(list(plain.parameters()), saved_steps[-1], state_path.with_suffix(".ema")) if lengths else None
    first, losses, window = 0, [], torch.zeros((), device=runtime.device)
    with files.continuing(state_path) as state:
        if state is not None:
            plain.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            if posthoc is not None:
                posthoc.load_state_dict(state["posthoc"])
            first, losses, window = state["step"], state["losses"], state["window"].to(runtime.device)
    images, labels, last = split.images.to(runtime.device), split.labels.to(runtime.device), saved_steps[-1]
    network.train()
    start, done, measured = time.perf_counter(), first, 0.0
    ended = after is not None and first in saved_steps and after(first)
    with bar(last, description, "step", first) as progress:
        for step in range(first, first if ended else last):
            set_rate(optimizer, c.generator_learning_rate * rate_factor(step, 0 if c.budget else c.generator_steps))
            share = torch.arange(rank, c.generator_batch_size, world_size)
            with autocast(runtime.device, precision):
                loss = batch_loss(context, network, images, labels, step, seed, share)
            optimizer.zero_grad()
            trainer.backward(loss)
            optimizer.step()
            if own.skipped:
                got = f"{float(loss.detach())} with gradients of norm {own.grad_norm} before step {step + 1}"
                raise UserError(f"run: generator loss must be finite, got {got}")
            window += loss.detach()
            done = step + 1
            if posthoc is not None:
                posthoc.step()
            progress.update()
            if done % LOG_EVERY == 0 or done == last:
                mean = float(window) / (done - (losses[-1][0] if losses else 0))
                if not math.isfinite(mean):
                    raise UserError(f"run: generator loss must be finite, got {mean} before step {done}")
                losses.append([done, mean])
                window.zero_()
                progress.set(loss=mean)
            if rank == 0 and done in saved_steps:
                save(context, plain, ema, folder_of(done), split.labels)
            if rank == 0 and posthoc is not None:
                posthoc.save(done, saved_steps)
                for length in lengths.get(done, ()):
                    save(context, plain, Average(posthoc, length, done), folder_of(done, length), split.labels)
            if rank == 0 and (done in saved_steps or done % SAVE_EVERY == 0) and (keep_state or done < last):
                training = {"network": plain.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
                training |= {} if posthoc is None else {"posthoc": posthoc.state_dict()}
                files.save_state(state_path, {**training, "step": done, "losses": losses, "window": window})
            if after is not None and done in saved_steps:
                before = time.perf_counter()
                ended = after(done)
                measured += time.perf_counter() - before
                if ended:
                    break
    seconds, trained = time.perf_counter() - start - measured, (done - first) * c.generator_batch_size
    if not single_process:
        runtime.barrier()
    if rank == 0 and not keep_state:
        state_path.unlink(missing_ok=True)
        if posthoc is not None:
            posthoc.remove()
    return {
        "checkpoints": [step for step in saved_steps if step <= done],
        "images_per_second": trained / seconds if trained > 0 else None,  # since the last start
        "parameters": sum(value.numel() for value in plain_state(dict(plain.named_parameters())).values()),
        "curves": {"step": [step for step, _ in losses], "loss": [value for _, value in losses]},
    }


def for_training(context: Context, network: Any) -> Any:
    """``network`` in channels_last, trained by this package's kernels where these know the run's precision."""
    network = network.to(memory_format=torch.channels_last)
    if context.runtime.device.type == "cpu" or context.precision.generator == "float32":
        optimize(network, training=True)
    return network


def _accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no")  # the loss is computed under autocast here


class _SingleProcess:
    """The methods of an Accelerator that :func:`train` calls, for one process that trains without the others."""

    def __init__(self, context: Context):
        self._device = context.runtime.device

    def prepare(self, network: Any, optimizer: Any) -> tuple[Any, Any]:
        return network.to(self._device), optimizer

    def unwrap_model(self, network: Any) -> Any:
        return network

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero over ``steps``; constant where they are 0, which is not known."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 * (1 + math.cos(math.pi * step / steps)) if steps else 1.0)


def set_rate(optimizer: Any, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def validation_loss(context: Context, path: Path) -> float:
    """Mean loss of the checkpoint in ``path`` on validation images, with the same noise at each call."""
    val, device = context.data.val, context.runtime.device
    network, _, _ = load(path, device)
    images, labels = val.images.to(device), val.labels.to(device)
    share, seed = torch.arange(context.config.generator_batch_size), seeds.derive(context.config.seed, "validation")
    losses = [batch_loss(context, network, images, labels, batch, seed, share) for batch in range(VALIDATION)]
    return float(torch.stack(losses).mean())


def save(context: Context, network: Any, ema: Any, path: Path, labels: Tensor) -> None:
    """Save the EMA weights in diffusers' format, with the counts of the classes that it was trained on."""
    if path.exists():
        return
    with files.atomic_folder(path) as folder:
        with ema.applied():
            network.save_config(folder / "unet")
            # Not by save_pretrained, which hides a full disk in its own error.
            files.save_tensors(folder / "unet" / WEIGHTS, plain_state(network.state_dict()), {"format": "pt"})
        make_scheduler(context.config.generator_objective).save_pretrained(folder / "scheduler")
        # The shape of images before padding, which the network's configuration does not hold.
        facts = {"image_shape": list(context.data.image_shape), "class_counts": context.class_counts(labels)}
        files.write_json(folder / "objective.json", {"objective": context.config.generator_objective, **facts})
