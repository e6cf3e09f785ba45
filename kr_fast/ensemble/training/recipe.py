"""One classifier training loop, for the Teacher and for its shadows, so that both follow the same recipe."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.data import Augment, AugmentParams, Split, augmented, to_float
from kr_fast.ensemble.networks import answers_rule, ask, check_sizes, checked, device_of, failures
from kr_fast.ensemble.training.evaluation import SCORES, examples, scores
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_integer, described
from kr_fast.runtime.options import check, option
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.training import SGD
from kr_fast.training.fused import fused
from kr_fast.training.precision import autocast, check_precision

LEAST_MIXUP = 0.01
WARM_UP = 0.2  # share of the steps in which the rate rises


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """SGD with Nesterov momentum under a one-cycle schedule (Smith and Topin, 2018), and standard augmentation.

    A value out of its range is refused; a rate that is too high for a network shows in its loss, see :func:`fit`.
    """

    epochs: int = option(40, "passes over the training images", least=1, most=1_000_000)
    batch_size: int = option(64, "images a step", least=1, most=1_000_000)
    learning_rate: float = option(0.1, "peak of the one-cycle schedule", above=0)
    weight_decay: float = option(5e-4, "of weights, not of biases and norms", least=0)
    label_smoothing: float = option(0.0, "share of each label that goes to all classes", least=0, below=1)
    mixup: float = option(
        0.0, "alpha of mixup, which mixes pairs of images and their labels; 0 for none", least=0, most=100
    )
    augment: Augment = dataclasses.field(default_factory=Augment)

    def __post_init__(self):
        check(self, "TrainConfig")
        if 0 < self.mixup < LEAST_MIXUP:  # of which next to no pair is mixed, and shares are lost to rounding
            fail("TrainConfig", "mixup", f"be 0 or at least {LEAST_MIXUP}", self.mixup)


@dataclasses.dataclass
class History:
    """Curves of a training run; ``best_epoch`` is the one whose weights the model holds at the end."""

    train_loss: list[float] = dataclasses.field(default_factory=list)
    val_accuracy: list[float] = dataclasses.field(default_factory=list)
    val_loss: list[float] = dataclasses.field(default_factory=list)
    val_auc: list[float] = dataclasses.field(default_factory=list)  # where the epoch is chosen by it
    best_epoch: int = 0


def make_optimizer(
    model: nn.Module, config: TrainConfig, steps: int, max_grad_norm: float | None = None
) -> tuple[SGD, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and schedule of a recipe over ``steps`` steps; no weight decay on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True, max_grad_norm=max_grad_norm)
    # torch divides by the length of the warm-up, which begins at step 0 and is none for 5 steps in all.
    warm_up = WARM_UP if WARM_UP * steps != 1 else WARM_UP - 1e-9
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(steps, 2), pct_start=warm_up
    )
    return optimizer, schedule


@dataclasses.dataclass(frozen=True)
class Steps:
    """How a recipe cuts ``count`` examples into steps."""

    batch: int
    per_epoch: int

    @classmethod
    def of(cls, config: TrainConfig, count: int) -> "Steps":
        """Whole batches only; one short batch where there are fewer examples."""
        return cls(min(config.batch_size, count), max(count // config.batch_size, 1))


def epoch_draws(
    config: TrainConfig, count: int, size: tuple[int, int], seed: int, epoch: int
) -> tuple[Tensor, AugmentParams, Tensor | None]:
    """What is random in one epoch, on the CPU: the shuffle (indices in [0, count)), as many draws of the augmentation,
    and each image's own share in mixup (float32; one of a batch), None without mixup.

    Whoever trains with ``seed``, alone or among others, sees these.
    """
    generator, steps = seeds.generator(seed, "fit", epoch), Steps.of(config, count)
    used = steps.batch * steps.per_epoch
    order, draws = torch.randperm(count, generator=generator)[:used], config.augment.draw(used, size, generator)
    if not config.mixup:
        return order, draws, None
    shares = np.random.default_rng(seeds.derive(seed, "mixup", epoch)).beta(config.mixup, config.mixup, steps.per_epoch)
    return order, draws, torch.from_numpy(shares).float().repeat_interleave(steps.batch)


def mixed(x: Tensor, share: Tensor | None) -> Tensor:
    """``share x_i + (1 - share) x_j``, where image j stands as far from the end of the batch as i from its beginning.

    As batches are shuffled, pairs are random.

    Args:
        x: ``[..., B, C, H, W]``; share: ``[..., B]`` or None.
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    return x if share is None else torch.lerp(x.flip(-4), x, share[..., None, None, None].to(x.dtype))


def mixed_loss(logits: Tensor, labels: Tensor, share: Tensor | None, smoothing: float) -> Tensor:
    """The cross-entropy of each of ``[..., B]`` images; with mixup ``share l(y_i) + (1 - share) l(y_j)``."""

    def loss(of: Tensor) -> Tensor:
        flat = nn.functional.cross_entropy(
            logits.flatten(0, -2), of.flatten(), reduction="none", label_smoothing=smoothing
        )
        return flat.view(labels.shape)

    return loss(labels) if share is None else torch.lerp(loss(labels.flip(-1)), loss(labels), share)


def fit(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    *,
    seed: int,
    val: Split | None = None,
    state_path: str | Path | None = None,
    save_every: int = 10,
    choose: str = "accuracy",
    precision: str = "float32",
    description: str | None = None,
) -> History:
    """Train ``model`` in place on ``split`` with cross-entropy.

    All randomness is a function of (seed, epoch), so a run that is killed and continued from ``state_path`` ends with
    the same weights as one that was not.

    Args:
        model: an ``nn.Module`` from float ``[N, C, H, W]`` to logits, on the device to train on.
        split: training images, uint8 ``[N, H, W, C]``, and labels, integers ``[N]`` below the number of logits.
        config: the recipe.
        seed: of shuffles and augmentation (the caller seeds the weights).
        val: where given, the weights of the epoch that is best on it (the latest of equals) are kept.
        state_path: file to continue from and to save to every ``save_every`` epochs (1 or more); removed at the end.
        choose: the best epoch by "accuracy", by "loss", the mean cross-entropy, which also sees how sure a model is (a
            model that is sure of its own training images is easier to attack), or by "auc", see
            :func:`kr_fast.metrics.macro_auc`.
        precision: of activations and products in training, "float32" or "bfloat16"; accuracies are float32's.
        description: shows a progress bar under this name.
    Raises: UserError naming the argument; for any failure of the model's own code; if the loss is not finite.
    """
    options = {"seed": seed, "val": val, "state_path": state_path, "save_every": save_every}
    options |= {"choose": choose, "precision": precision, "description": description}
    return fit_for("fit", model, split, config, **options)


def fit_for(
    where: str,
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    *,
    seed: int,
    val: Split | None = None,
    state_path: str | Path | None = None,
    save_every: int = 10,
    choose: str = "accuracy",
    precision: str = "float32",
    description: str | None = None,
    which: str = "",
) -> History:
    """:func:`fit` for the function ``where``, which begins the errors; ``which`` model it is (" for model 3")."""
    if not isinstance(config, TrainConfig):
        fail(where, "config", "be a TrainConfig", described(config))
    seed, save_every = as_integer(where, "seed", seed), as_integer(where, "save_every", save_every, 1)
    check_precision(where, precision)
    if choose not in SCORES:
        fail(where, "choose", f"be one of {', '.join(SCORES)}", repr(choose))
    split, val, device = _checked(where, model, split, val)
    if val is not None and choose == "auc" and len(val.labels.unique()) < 2:
        fail(where, "val", "hold at least two classes to choose by auc", 1)
    images, labels = split.images.to(device), split.labels.to(device)
    count, rule = len(labels), answers_rule((0, *split.images.shape[3:], *split.images.shape[1:3]))
    steps, size = Steps.of(config, count), tuple(images.shape[1:3])
    optimizer, schedule = make_optimizer(model, config, config.epochs * steps.per_epoch)
    history, best, best_value, first = History(), None, -math.inf, 0
    with files.continuing(state_path) as state:
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            history, best, first = History(**state["history"]), state["best"], state["epoch"]
            best_value = state["best_value"]
    model.train()
    forked = [device] if device.type == "cuda" else []
    with (
        fused(model),
        torch.random.fork_rng(devices=forked),
        bar(config.epochs, description, "epoch", first) as progress,
    ):
        for epoch in range(first, config.epochs):
            torch.manual_seed(seeds.derive(seed, "dropout", epoch))
            order, draws, shares = epoch_draws(config, count, size, seed, epoch)
            order, draws, shares = order.to(device), draws.to(device), None if shares is None else shares.to(device)
            total = torch.zeros((), device=device)
            for step in range(steps.per_epoch):
                rows = slice(step * steps.batch, (step + 1) * steps.batch)
                batch, share = order[rows], None if shares is None else shares[rows]
                x = mixed(augmented(images, batch, draws[rows]), share)
                with failures(where, "model", rule):
                    with autocast(device, precision):
                        logits = checked(where, "model", model(x), x)
                        loss = mixed_loss(logits, labels[batch], share, config.label_smoothing).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if optimizer.skipped:
                        value = float(loss.detach())
                        if math.isfinite(value):
                            got = f"norm {optimizer.grad_norm} at loss {value}{which} in step {step} of epoch {epoch}"
                            fail(where, "gradients", "be finite", got)
                        fail(where, "loss", "be finite", f"{value}{which} in epoch {epoch}")
                schedule.step()
                total += loss.detach()
            history.train_loss.append(float(total) / steps.per_epoch)
            if not history.train_loss[-1] < float("inf"):
                fail(where, "loss", "be finite", f"{history.train_loss[-1]}{which} in epoch {epoch}")
            if val is not None:
                of_val = scores(model, val, choose)
                history.val_accuracy.append(of_val.accuracy)
                history.val_loss.append(of_val.loss)
                if choose == "auc":
                    history.val_auc.append(of_val.value)
                if of_val.value >= best_value:
                    best_value, history.best_epoch = of_val.value, epoch
                    best = copy.deepcopy(model.state_dict())
            else:
                history.best_epoch = epoch
            progress.update()
            progress.set(loss=history.train_loss[-1], **({} if val is None else {"val": history.val_accuracy[-1]}))
            if state_path and (epoch + 1) % save_every == 0 and epoch + 1 < config.epochs:
                files.save_state(
                    state_path,
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "history": dataclasses.asdict(history),
                        "best": best,
                        "best_value": best_value,
                        "epoch": epoch + 1,
                    },
                )
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    if state_path:
        Path(state_path).unlink(missing_ok=True)
    return history


def _checked(where: str, model: nn.Module, split: Split, val: Split | None) -> tuple[Split, Split | None, torch.device]:
    """The splits as tensors, and the device, of a model that answers and can be trained."""
    if not isinstance(model, nn.Module):
        fail(where, "model", "be a torch module", described(model))
    check_sizes(where, "model", model)
    if not any(weight.requires_grad for weight in model.parameters()):
        fail(where, "model", "have weights to train", f"a {type(model).__name__} of none that requires a gradient")
    split, device = examples(where, split), device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout that is never off
        logits = ask(where, "model", model, to_float(split.images[:2].to(device)), finite=False)
    classes, shape = logits.shape[1], tuple(split.images.shape[1:])
    split = examples(where, split, classes)
    return split, None if val is None else examples(where, val, classes, shape, "val"), device
