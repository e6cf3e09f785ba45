"""Which precision a run trains in: decided once, before the first stage, and recorded with its data."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.models import classifier, padded_size, unet
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context, Precision
from kr_fast.synthesis.optimized.optimize import optimize
from kr_fast.training import SGD, AdamW
from kr_fast.training.precision import autocast, gain, has_amx

LEAST_GAIN = 1.15  # of bfloat16 over float32: what is gained has to be worth the rounding
SECONDS = 0.5  # in which steps of either network are timed
BATCH, PIXELS = 32, 32 * 28 * 28  # of such a step at most


def of_run(context: Context) -> Precision:
    """The run's precision on this device: on a CPU the recorded one, or what is decided now; the same on every rank."""
    runtime = context.runtime
    if runtime.device.type != "cpu":
        generator = "bfloat16" if runtime.mixed_precision == "bf16" else "float32"
        return Precision("float32", generator, f"trained on a {runtime.device.type} device")
    recorded = context.journal.done("data")
    if recorded is not None:
        return Precision(**recorded["precision"])
    with runtime.main_first() as main:
        decided = decide(context.config, context.data.image_shape, context.data.num_classes) if main else None
    return runtime.broadcast(decided)


def decide(config: RecycleConfig, image_shape: tuple[int, int, int], classes: int) -> Precision:
    """The precision on this CPU: the one that ``config`` asks for, else the faster one.

    That is float32 where the processor has no AMX. Where it has, steps of the Teacher and of the generator are timed
    in both, on random images, and bfloat16 is taken for either where it is :data:`LEAST_GAIN` times as fast.

    Args:
        image_shape: (height, width, channels).
        classes: how many there are.
    """
    if config.precision != "auto":
        return Precision(config.precision, config.precision, "asked for")
    if not has_amx():
        return Precision(reason="the processor has no AMX")
    with torch.random.fork_rng(devices=[]):
        gains = [gain(make(config, image_shape, classes), SECONDS) for make in (classifier_step, generator_step)]
    taken = ["bfloat16" if each >= LEAST_GAIN else "float32" for each in gains]
    words = f"measured, bfloat16 is {gains[0]:.2f} times as fast for classifiers and {gains[1]:.2f} for the generator"
    return Precision(*taken, words)


def classifier_step(config: RecycleConfig, image_shape: tuple[int, int, int], classes: int) -> Callable:
    """Precision -> a step of the Teacher."""
    height, width, channels = image_shape
    batch = _batch(config.teacher_batch_size, height * width)
    options = {"num_classes": classes, "in_channels": channels, "width": config.teacher_width}

    def make(precision: str) -> Callable[[], None]:
        network = classifier(config.teacher_arch, image_size=max(height, width), **options)
        x, labels = torch.randn(batch, channels, height, width), torch.arange(batch) % classes
        optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        return _step(network, optimizer, precision, lambda: F.cross_entropy(network(x), labels))

    return make


def generator_step(config: RecycleConfig, image_shape: tuple[int, int, int], classes: int) -> Callable:
    """Precision -> a step of the generator."""
    height, width, channels = image_shape
    batch, levels = _batch(config.generator_batch_size, height * width), len(config.generator_widths)
    options = {"widths": config.generator_widths, "layers": config.generator_layers}

    def make(precision: str) -> Callable[[], None]:
        network = unet(height, width, channels, classes, **options)
        x = torch.randn(batch, channels, padded_size(height, levels), padded_size(width, levels))
        x, level, labels = x.contiguous(memory_format=torch.channels_last), torch.rand(batch), torch.arange(batch)
        optimizer = AdamW(network.parameters(), lr=1e-4, max_grad_norm=1.0)

        def loss() -> Tensor:
            return F.mse_loss(network(x, 1000 * level, class_labels=labels % classes).sample.float(), x)

        return _step(network, optimizer, precision, loss)

    return make


def _batch(count: int, pixels: int) -> int:
    """Images of a timed step: those of a step of the run, or fewer, so that it is quick."""
    return min(count, BATCH, max(PIXELS // pixels, 2))


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, precision: str, loss: Callable[[], Tensor]
) -> Callable[[], None]:
    optimize(network.train(), training=True)

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step
